"""Steps in two pieces that overlap: what they compute, send and wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.runtime.cli import run
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, MergecError, PartyError, PeerEndedError
from mergec.runtime.core.network import NETWORKS, Link
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER
from mergec.runtime.engine.rehearsal import Rehearsal, overlapped_seconds, step_cost
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.conversations import Place
from mergec.runtime.session.requests import Plan, write_step
from mergec.runtime.transport.emulated import EmulatedLink
from mergec.runtime.transport.frames import Kind
from mergec.runtime.transport.loopback import link_pair
from mergec.runtime.transport.pipeline import pipelined
from tests import characters, decoder
from tests.services import Deployment, answered, deployment
from tests.session import compiled

ERROR = 2e-2
"""Error of the tiny decoders' logits under MPC, with a reserve."""

PROMPT = [5, 1, 7, 2, 9, 3]


def divided(session: InProcessSession, ids: list[int], past: int, split: int) -> torch.Tensor:
    """The logits of a step whose first piece has `split` tokens."""
    return session.step(ids, past, split=split)


# ---------------------------------------------------------------------------------- three threads


@pytest.fixture(scope="module")
def roles() -> dict[str, Any]:
    return {role: decoder.program(role) for role in ROLES}


@pytest.mark.parametrize("split", range(1, 6))
def test_every_split_gives_the_same_answer(roles: dict[str, Any], split: int) -> None:
    with InProcessSession(roles) as whole:
        expected = [whole.step(PROMPT, 0), whole.step([4, 8], 6), whole.step([1], 3)]
    with InProcessSession(roles) as run:
        found = [
            divided(run, PROMPT, 0, split),
            divided(run, [4, 8], 6, 1),  # after caches
            run.step([1], 3),  # rolled back over the border
        ]
        masks = {p: run._sessions[p]._caches for p in (CLIENT, SERVER, DEALER)}
        for name, cache in masks[DEALER].items():
            assert torch.equal(masks[CLIENT][name].mask + masks[SERVER][name].mask, cache.mask)
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).abs().max()) < ERROR


@pytest.mark.parametrize(
    ("family", "options"),
    [("gpt2", {}), ("llama", {"network": "wan"}), ("gpt2", {"preset": "merge-mm"})],
    ids=["gpt2", "llama on wan", "sent caches"],
)
def test_compiled_programs_in_pieces(family: str, options: dict[str, Any]) -> None:
    """The answer, and the messages: those of the rehearsal, of which the transport counts all."""
    programs = compiled(family, **options)[1].roles
    rehearsal = Rehearsal(programs["client"])
    turns = rehearsal.pieces(4, 6, 0)
    with InProcessSession(programs) as whole:
        expected = whole.step(PROMPT, 0)
    with InProcessSession(programs) as run:
        before = run._sessions[CLIENT].traffic()
        logits = divided(run, PROMPT, 0, 4)
        spent = run._sessions[CLIENT].traffic() - before
        assert float((logits - expected).abs().max()) < ERROR
        after = run.step([8], 6)
    with InProcessSession(programs) as whole:
        whole.step(PROMPT, 0)
        assert float((whole.step([8], 6) - after).abs().max()) < ERROR
    assert spent.online == sum(turn.online for turn in turns)
    assert spent.rounds == len(turns)
    # The second piece lags by a part of one layer; without overlap there would be twice as many.
    separate = step_cost(rehearsal, 2, 4).cost.rounds
    assert max(turn.number for turn in turns) < separate * 1.75
    assert [(t.number, t.piece) for t in turns] == sorted((t.number, t.piece) for t in turns)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_second_piece_lags_by_a_part_of_a_layer(family: str) -> None:
    """It waits for the first one's keys and values, once: then both are a layer's part apart."""
    program = compiled(family, network="wan")[1].roles["client"]
    rehearsal = Rehearsal(program)
    turns, alone = rehearsal.pieces(8, 16, 0), step_cost(rehearsal, 8, 8).cost.rounds
    layers = len([spec for spec in program.inputs if spec.cache_output]) // 2
    lag = max(turn.number for turn in turns) + 1 - alone
    assert 0 <= lag <= alone // layers


def test_the_first_piece_reveals_nothing(roles: dict[str, Any]) -> None:
    """No logits of it are computed: as many bytes are missing as the head and what leads to it."""
    rehearsal = Rehearsal(roles["client"])
    both = sum(turn.online for turn in rehearsal.pieces(3, 6, 0))
    apart = sum(step_cost(rehearsal, *step).cost.online for step in ((3, 0), (3, 3)))
    logits = 8 * decoder.VOCAB
    assert apart - both > logits
    first = [turn.number for turn in rehearsal.pieces(3, 6, 0) if turn.piece == 0]
    assert max(first) < max(turn.number for turn in rehearsal.pieces(3, 6, 0)) - 5


def test_another_message_than_rehearsed_is_not_sent(roles: dict[str, Any]) -> None:
    with InProcessSession(roles) as run:
        client = run._sessions[CLIENT]
        client.split = 3
        client.rehearse(6, 0)
        assert client._rounds is not None
        client._rounds[5] = client._rounds[5][:-1]
        before = client.traffic().sent
        with pytest.raises((BundleError, PartyError)):
            divided(run, PROMPT, 0, 3)
        assert client.traffic().sent <= before + sum(
            turn.online for turn in Rehearsal(roles["client"]).pieces(3, 6, 0)[:5]
        )


@pytest.mark.parametrize("split", [-1, 6, 7])
def test_pieces_that_are_none(roles: dict[str, Any], split: int) -> None:
    with InProcessSession(roles) as run:
        assert not run._sessions[CLIENT].divides(split, 6)
        with pytest.raises((BundleError, PartyError)):
            divided(run, PROMPT, 0, split)


def test_programs_that_have_no_pieces() -> None:
    resends = InProcessSession(compiled("gpt2", preset="merge-er")[1].roles)._sessions[CLIENT]
    assert resends.divides(0, 6)
    assert not resends.divides(3, 6)


# --------------------------------------------------------------------------------------- the links


def test_rounds_of_a_pipeline_arrive_in_order() -> None:
    client, server = link_pair()
    big = torch.arange(1 << 16, dtype=torch.int64).view(torch.uint8)

    def answer() -> None:
        with pipelined(server) as link:
            assert link is not None
            for _ in range(3):
                first, second = link.begin(big, 3), link.begin(None, big.numel())
                assert first().tolist() == [1, 2, 3]
                assert torch.equal(second(), big)

    thread = threading.Thread(target=answer)
    thread.start()
    with pipelined(client) as link:
        assert link is not None
        for _ in range(3):
            small = torch.tensor([1, 2, 3], dtype=torch.uint8)
            waits = link.begin(small, big.numel()), link.begin(big, 0)
            assert torch.equal(waits[0](), big)
            assert waits[1]().numel() == 0
    thread.join()
    assert client.traffic.rounds == server.traffic.rounds == 6
    assert client.traffic.sent == 3 * (3 + big.numel())


def test_a_lost_peer_is_noticed_in_a_pipeline() -> None:
    client, server = link_pair(timeout=20.0)
    server.close()
    with pytest.raises(PeerEndedError), pipelined(client) as link:
        assert link is not None
        link.begin(None, 3)()


def test_two_messages_wait_for_one_latency() -> None:
    latency, slow = 0.2, Link(0.2, 1e9)
    client, server = (EmulatedLink(link, slow) for link in link_pair())
    word = torch.zeros(8, dtype=torch.uint8)

    def play(end: EmulatedLink) -> None:
        with pipelined(end) as link:
            assert link is not None
            for arriving in [link.begin(word, 8) for _ in range(4)]:
                arriving()

    thread = threading.Thread(target=play, args=(server,))
    began = time.monotonic()
    thread.start()
    play(client)
    thread.join()
    assert latency <= time.monotonic() - began < 2.5 * latency
    assert client.traffic.sent == client.traffic.received == 32


# -------------------------------------------------------------------------------------- the choice


def test_the_cost_model_chooses(monkeypatch: Any) -> None:
    session = InProcessSession(compiled("llama", network="wan")[1].roles)._sessions[CLIENT]
    rehearsal = session.rehearsal
    assert rehearsal is not None
    session.divide(30, 0)
    assert session.split == 0  # only a client whose options allow it
    session.overlaps = True
    network = NETWORKS["wan"]
    for new, past in ((8, 0), (16, 0), (30, 0), (20, 9)):
        session.divide(new, past)
        whole = step_cost(rehearsal, new, past).waiting(network)
        halves = overlapped_seconds(rehearsal, max(new // 2, 1), new, past, network)
        better = new >= 16 and halves < whole.total
        assert session.split == (new // 2 if better else 0)
    slow = replace(network, parties=Link(2e-2, 1e4))
    monkeypatch.setitem(NETWORKS, "wan", slow)
    session.divide(30, 0)
    assert session.split == 15
    session.ahead.add(b"", 30, 0, {})  # what was dealt as a whole runs so
    session.divide(30, 0)
    assert session.split == 0
    session.ahead.clear()
    manifest = session.program.manifest
    checking = replace(session.program, manifest=replace(manifest, speculate_up_to=14))
    session.program = checking
    for new, split in ((30, 0), (32, 16)):  # 15 positions would be revealed, 16 are one
        session.divide(new, 0)
        assert session.split == split
    fast = InProcessSession(compiled("llama")[1].roles)._sessions[CLIENT]
    fast.overlaps = True
    fast.divide(30, 0)
    assert fast.split == 0


@pytest.fixture
def slow_link(monkeypatch: Any) -> None:
    """Where messages take so long that two halves are faster."""
    slow = NETWORKS["wan"]
    link = Link(1e-3, 1e4)
    monkeypatch.setitem(NETWORKS, "loopback", type(slow)(link, slow.to_server, slow.to_server))
    monkeypatch.setattr("mergec.runtime.session.own_steps._LEAST_DIVIDED", 4)


# --------------------------------------------------------------------------------- three processes


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("overlap"), model="tiny")


@pytest.fixture(scope="module")
def deployed(bundles: Path) -> Iterator[Deployment]:
    serve = ("--timeout", "8", "--grace", "5", "--prepare-disk", "50MB")
    with deployment(bundles, serve=serve) as made:
        yield made


@pytest.mark.usefixtures("slow_link")
def test_halves_at_a_server(deployed: Deployment, bundles: Path) -> None:
    rehearsal = Rehearsal(decoder.program("client"))
    with deployed.connection() as connection:
        first = list(connection.generate(PROMPT, max_tokens=2))
        assert [t.token for t in first] == decoder.plaintext(bundles, PROMPT, 2)
        report = first[0].reports[0]
        assert (report.new, report.rounds) == (6, len(rehearsal.pieces(3, 6, 0)))
        more = [*PROMPT, *(t.token for t in first), 4, 9, 9]
        assert answered(connection, more, 1) == (decoder.plaintext(bundles, more, 1), [4])
    with deployed.connection(overlap=False) as connection:
        (token,) = connection.generate(PROMPT, max_tokens=1)
        assert token.reports[0].rounds == step_cost(rehearsal, 6, 0).cost.rounds
    with deployed.connection(prompt_piece=4) as connection:
        assert answered(connection, PROMPT, 1) == (decoder.plaintext(bundles, PROMPT, 1), [4, 2])


@pytest.mark.parametrize("split", [-1, 4, 5, 1 << 40])
def test_a_client_that_asks_for_pieces_that_are_none(deployed: Deployment, split: int) -> None:
    with deployed.connection() as connection:
        server = connection._peers.channels[0]
        session = connection._session.steps
        assert session is not None
        connection._session._ask(server, session, 4, 1)
        server.send(Kind.STEP, write_step(4, 0, Draw(), Place(), split))
        with pytest.raises(PartyError, match=f"a first piece of {split} of 4"):
            server.receive(Kind.ROUND, limit=1 << 20)


def test_a_stored_answer_has_no_pieces() -> None:
    with pytest.raises(PartyError, match="but the store holds"):
        Plan(1, 4, 2).schedule().check(4, 0, Draw(), "client", Place(), 2)


@pytest.mark.slow
def test_local_runs_overlap(tmp_path: Path) -> None:
    program = compiled("llama", network="wan")[1]
    program.save(tmp_path / "program")
    ids = [5 + n % 9 for n in range(24)]
    found = [run_local(tmp_path / "program", ids, max_tokens=3, overlap=o) for o in (True, False)]
    assert found[0].tokens == found[1].tokens
    assert found[0].records[0].rounds > found[1].records[0].rounds


def test_the_command_runs_without(tmp_path: Path, monkeypatch: Any) -> None:
    import mergec.compiler.cli  # noqa: F401  (registers `run`)

    given: list[dict[str, Any]] = []

    def noted(*_: Any, **options: Any) -> Any:
        given.append(options)
        raise MergecError("not in this test")

    monkeypatch.setattr("mergec.runtime.roles.local.run_local", noted)
    folder = characters.save(tmp_path / "bundles")
    for more in ([], ["--no-overlap"]):
        assert run(["run", str(folder), "--prompt", "a", *more]) == 1
    assert [options["overlap"] for options in given] == [True, False]
