"""Steps that are dealt ahead: what comes of them, what is thrown away, and what can go wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from mergec.runtime.cli import run as mergec
from mergec.runtime.cli.options import size_of
from mergec.runtime.core.context import ClientContext, DealerContext, ServerContext
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import (
    BundleError,
    LimitError,
    MergecError,
    PartyError,
    PeerEndedError,
    PromptError,
)
from mergec.runtime.core.network import NETWORKS, Link
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.dealt_ahead import DealtAhead
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.preparer import Preparer
from mergec.runtime.roles.settings import Limits
from mergec.runtime.session.ahead import Ahead, AheadPlan
from mergec.runtime.session.conversations import Place
from mergec.runtime.session.requests import write_step
from mergec.runtime.transport.dealer_link import DealerReceiver
from mergec.runtime.transport.frames import Kind
from mergec.runtime.transport.loopback import _Blocks, dealer_pair
from mergec.runtime.transport.spool import SEGMENT_BYTES, Spool
from tests import characters, decoder
from tests.relay import DOWN, Relay
from tests.services import Deployment, Role, answered, deployment, role, wait_until
from tests.session import compiled

ERROR = 2e-2
"""Error of the tiny decoders' logits under MPC, with a reserve."""

PROMPT = [5, 1, 7, 2]
PLAN = AheadPlan(6)

# --------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("plan", "dealt", "end", "limit", "steps"),
    [
        (AheadPlan(3), 0, 4, 99, [(1, 4), (1, 5), (1, 6)]),
        (AheadPlan(3), 2, 6, 99, [(1, 6)]),  # what is left over is continued
        (AheadPlan(3), 3, 7, 99, []),
        (AheadPlan(3), 0, 4, 6, [(1, 4), (1, 5)]),
        (AheadPlan(2, 3), 0, 4, 99, [(3, 4), (1, 7), (1, 8)]),
        (AheadPlan(2, 3), 1, 5, 99, [(3, 4), (1, 7), (1, 8)]),  # and here it is not
        (AheadPlan(2, 3), 0, 4, 6, []),
        (AheadPlan(2, 1), 0, 4, 99, [(1, 4), (1, 5)]),
    ],
)
def test_what_is_dealt_next(
    plan: AheadPlan, dealt: int, end: int, limit: int, steps: list[tuple[int, int]]
) -> None:
    assert plan.steps(4, dealt, end, limit) == steps


def test_only_the_first_step_can_come() -> None:
    ahead, size = Ahead(), {"client": 1, "server": 10}
    for past in (4, 5, 6):
        ahead.add(write_step(1, past, Draw()), 1, past, size)
    assert (len(ahead), ahead.size("client"), ahead.size("server")) == (3, 3, 30)
    for other in (
        write_step(1, 5, Draw()),
        write_step(2, 4, Draw()),
        write_step(1, 4, Draw(1)),
        write_step(1, 4, Draw(), Place(1, 1)),
        write_step(1, 4, Draw(), Place(0, -1)),
    ):
        assert ahead.take(other) is None
    found = ahead.take(write_step(1, 4, Draw()))
    assert found is not None and found.number == 0
    assert [step.number for step in ahead.clear()] == [1, 2]
    assert (len(ahead), ahead.used, ahead.wasted, ahead.take(b"")) == (0, 1, 2, None)
    assert ahead.add(b"", 1, 4, size).number == 3  # no number, and so no mask, comes again


# ---------------------------------------------------------------------------------------- on disk


def block(size: int, first: int = 0) -> np.ndarray:
    return ((np.arange(size) * 7 + first) % 251).astype(np.uint8)


def test_a_spool_returns_what_was_put_and_its_files_show_nothing() -> None:
    spool, given = Spool(), [block(n, n) for n in (1, 5000, 17, 1 << 16)]
    held = [spool.put(data) for data in given]
    assert spool.size == sum(data.nbytes for data in given)
    file = held[0].segment.file
    assert os.fstat(file.fileno()).st_nlink == 0
    stored = os.pread(file.fileno(), 1 << 20, 0)
    assert len(stored) == spool.size + 16 * len(given)
    for n, data in enumerate(given[1:], 1):
        pieces = (bytes(data[i : i + 8]) for i in range(0, data.nbytes - 8, 8))
        assert not any(piece in stored for piece in pieces), n
    spool.drop(held[2])
    for n in (3, 0, 1):
        taken = spool.take(held[n])
        assert np.array_equal(taken, given[n])
        taken += 1  # nobody else has it
    assert spool.size == 0
    assert file.closed


def test_equal_blocks_look_different() -> None:
    spool = Spool()
    one, two = spool.put(block(64)), spool.put(block(64))
    stored = os.pread(one.segment.file.fileno(), 1 << 10, 0)
    assert stored[: two.start] != stored[two.start :]


def test_space_is_free_again_once_a_file_s_blocks_are_gone(monkeypatch: Any) -> None:
    monkeypatch.setattr("mergec.runtime.transport.spool.SEGMENT_BYTES", 150)
    spool = Spool()
    held = [spool.put(block(90, n)) for n in range(5)]
    assert len({id(h.segment) for h in held}) == 3  # 106 bytes each: two of them
    spool.drop(held[0])
    assert not held[0].segment.file.closed
    spool.take(held[1])
    assert held[1].segment.file.closed
    assert np.array_equal(spool.take(held[4]), block(90, 4))
    again = spool.put(block(3))
    assert np.array_equal(spool.take(again), block(3))
    assert SEGMENT_BYTES > 1 << 20


def test_a_damaged_spool_is_one_line() -> None:
    spool = Spool()
    held = spool.put(block(100))
    os.pwrite(held.segment.file.fileno(), b"\x00\x01", 50)
    with pytest.raises(MergecError, match="cannot be read back"):
        spool.take(held)


# ------------------------------------------------------------------------------ the dealer's stream


def words(count: int, first: int = 0) -> torch.Tensor:
    return torch.from_numpy(block(count, first))


MARK = torch.empty(0, dtype=torch.uint8)


@pytest.mark.parametrize("memory", [100, 1 << 20], ids=["on disk", "in memory"])
def test_what_is_dealt_ahead_is_read_later_or_skipped(memory: int) -> None:
    blocks = _Blocks()
    spool = Spool()
    stream = DealerReceiver(blocks, memory, spool=spool)
    for first in range(6):
        stream.expect(500)
        blocks.put(words(300, first))
        blocks.put(words(200, first + 100))
        blocks.put(MARK)
        stream.await_marks()
    assert stream.received == 3000
    assert spool.size == (3000 if memory < 200 else 0)
    assert torch.equal(stream.read(500), torch.cat([words(300), words(200, 100)]))
    stream.skip(500)
    assert torch.equal(stream.read(250), words(300, 2)[:250])
    stream.skip(250)
    assert torch.equal(stream.read(10), words(10, 3))
    stream.skip(1490)
    assert (stream.consumed, spool.size) == (3000, 0)
    blocks.put(words(20, 9))  # and then what is dealt for a step that is under way
    assert torch.equal(stream.read(20), words(20, 9))
    blocks.end()


def test_a_step_that_is_under_way_is_never_spooled() -> None:
    blocks, spool = _Blocks(), Spool()
    stream = DealerReceiver(blocks, 100, spool=spool)
    stream.expect(90)
    blocks.put(words(90))
    blocks.put(MARK)
    stream.await_marks()
    blocks.put(words(80))
    wait_until(lambda: stream.received == 90)
    assert (spool.size, stream._size) == (0, 90)
    stream.skip(90)
    assert torch.equal(stream.read(80), words(80))
    blocks.end()


def test_a_full_disk_loses_nothing(monkeypatch: Any) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    blocks, spool = _Blocks(), Spool()
    stream = DealerReceiver(blocks, 100, spool=spool)
    stream.expect(450)
    blocks.put(words(200))
    wait_until(lambda: spool.size == 200)
    monkeypatch.setattr("mergec.runtime.transport.spool.os.pwrite", full)
    for first in (1, 2):
        blocks.put(words(125, first))
    blocks.put(MARK)
    stream.await_marks()
    assert stream.trouble == "No space left on device"
    assert torch.equal(stream.read(450), torch.cat([words(200), words(125, 1), words(125, 2)]))
    blocks.end()


def test_a_stream_that_ends_before_the_mark() -> None:
    blocks = _Blocks()
    stream = DealerReceiver(blocks, 100, spool=Spool())
    stream.expect(10)
    blocks.put(words(10))
    wait_until(lambda: stream.received == 10)
    blocks.end()
    with pytest.raises(PeerEndedError):
        stream.await_marks()
    with pytest.raises(PeerEndedError):
        stream.skip(11)


# -------------------------------------------------------------------------------------- the masks


def contexts() -> tuple[Any, Any, Any]:
    seeds = b"c" * 32, b"s" * 32
    to, source = dealer_pair()
    dealer = DealerContext(*seeds, to, to)
    return ClientContext(seeds[0], source), ServerContext(seeds[1], source), dealer


def test_branches_agree_at_all_roles_and_leave_the_main_streams_alone() -> None:
    client, server, dealer = contexts()
    found: list[torch.Tensor] = []
    for numbers in ([2, 5], [5]):  # at the dealer, and at parties to whom step 2 never came
        roles = (dealer,) if 2 in numbers else (client, server)
        shares = []
        for context in roles:
            first = context.mask((40,))
            for number in numbers:
                with context.branch(number):
                    inner = context.mask((40,))
            shares.append(torch.stack([first, inner, context.mask((40,))]))
        found.append(sum(shares[1:], shares[0]))
    assert torch.equal(*found)
    rows = [set(row.tolist()) for row in found[0]]
    assert all(not a & b for i, a in enumerate(rows) for b in rows[:i])
    straight = contexts()[2]
    assert torch.equal(straight.mask((80,)), found[0][[0, 2]].flatten())


def test_a_branch_is_entered_once() -> None:
    for context in contexts():
        with context.branch(3):
            pass
        for number in (3, 2, 0, -1):
            with pytest.raises(RuntimeError, match="drawn a second time"), context.branch(number):
                pass
        with context.branch(4):
            pass


def test_an_error_within_a_branch_leaves_it() -> None:
    client, _, dealer = contexts()
    for context, attribute in ((client, "_prg"), (dealer, "_client")):
        before = getattr(context, attribute)
        with pytest.raises(ValueError, match="x"), context.branch(0):
            raise ValueError("x")
        assert getattr(context, attribute) is before


# ---------------------------------------------------------------------------------- three threads


@pytest.fixture(scope="module")
def roles() -> dict[str, Any]:
    return {role: decoder.program(role) for role in ROLES}


def test_steps_dealt_ahead_come_or_are_thrown_away(roles: dict[str, Any]) -> None:
    with InProcessSession(roles) as plain:
        expected = [plain.step(ids, past) for ids, past in ((PROMPT, 0), ([3], 4), ([9, 9], 5))]
    with InProcessSession(roles) as run:
        parties = run._sessions
        run.deal_ahead(4, 0)
        run.deal_ahead(1, 4)
        run.deal_ahead(1, 5)
        assert [parties[party].length for party in (CLIENT, SERVER, DEALER)] == [0, 0, 6]
        assert {party: parties[party].present for party in parties} == dict.fromkeys(parties, 0)
        assert float((run.step(PROMPT, 0) - expected[0]).abs().max()) < ERROR
        assert float((run.step([3], 4) - expected[1]).abs().max()) < ERROR
        assert [len(parties[party].ahead) for party in parties] == [1, 1, 1]
        gone = {
            name: cache.mask[..., 5, :].clone() for name, cache in parties[DEALER]._caches.items()
        }
        # Two tokens come, and one was dealt for.
        assert float((run.step([9, 9], 5) - expected[2]).abs().max()) < ERROR
        assert [len(parties[party].ahead) for party in parties] == [0, 0, 0]
        for name, cache in parties[DEALER]._caches.items():
            mask = cache.mask
            assert not set(mask.flatten().tolist()) & set(gone[name].flatten().tolist())
            shares = [parties[party]._caches[name].mask for party in (CLIENT, SERVER)]
            assert torch.equal(sum(shares[1:], shares[0]), mask)
        assert parties[CLIENT].ahead.wasted == 1
        run.deal_ahead(1, 7)
        run.turn_to(Place(1, 0))  # another conversation continues a copy
        assert float((run.step([3], 4) - expected[1]).abs().max()) < ERROR


@pytest.mark.parametrize("options", [{}, {"preset": "merge-mm"}], ids=["masked", "sent"])
def test_steps_dealt_ahead_give_the_same_words(options: dict[str, Any]) -> None:
    """Only masks differ: what is thrown away changes nothing but them."""
    programs = compiled("gpt2", **options)[1].roles
    with InProcessSession(programs) as run:
        run.step(PROMPT, 0)
        for past in (4, 5):
            run.deal_ahead(1, past)
        before = [run._sessions[party].traffic() for party in (CLIENT, SERVER)]
        ahead = run.step([3], 4)
        run.deal_ahead(2, 5)  # anew: what was dealt for one token goes
        assert [step.new for step in run._sessions[SERVER].ahead.steps] == [2]
        both = run.step([8, 8], 5)
        spent = [
            (run._sessions[party].traffic() - old).offline_received
            for party, old in zip((CLIENT, SERVER), before, strict=True)
        ]
        assert spent == [
            sum(run._sessions[CLIENT].dealt(new, past)[role] for new, past in ((1, 4), (2, 5)))
            for role in ("client", "server")
        ]
    with InProcessSession(programs) as plain:
        plain.step(PROMPT, 0)
        assert float((plain.step([3], 4) - ahead).abs().max()) < ERROR
        assert float((plain.step([8, 8], 5) - both).abs().max()) < ERROR


def test_what_cannot_be_dealt_ahead(roles: dict[str, Any]) -> None:
    with InProcessSession(roles) as run:
        run.step(PROMPT, 0)
        run.deal_ahead(1, 4)
        session = run._sessions[CLIENT]
        for past, place in ((3, (0, 0)), (6, (0, 0)), (5, (1, 1)), (5, (0, 1)), (5, (0, -1))):
            with pytest.raises(BundleError, match="continue nothing; 5 would be next"):
                session.enter_ahead(b"", 1, past, Draw(), Place(*place))
        assert len(session.ahead) == 1


def test_a_step_must_take_all_that_was_dealt_for_it(roles: dict[str, Any]) -> None:
    with InProcessSession(roles) as run:
        run.step(PROMPT, 0)
        run.deal_ahead(1, 4)
        for party in (CLIENT, SERVER):
            step = run._sessions[party].ahead._steps[0]
            run._sessions[party].ahead._steps[0] = type(step)(
                step.number, step.request, 1, 4, {"client": 8, "server": 8}
            )
        with pytest.raises(BundleError, match="other randomness than was dealt"):
            run.step([3], 4)


# --------------------------------------------------------------------------------- three processes

pytestmark = pytest.mark.usefixtures("far_dealer")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("ahead"), model="tiny")


@pytest.fixture(scope="module")
def deployed(bundles: Path) -> Iterator[Deployment]:
    serve = ("--timeout", "8", "--grace", "5", "--conversations", "2", "--prepare-disk", "50MB")
    with deployment(bundles, serve=serve) as made:
        yield made


@pytest.fixture
def far_dealer(monkeypatch: Any) -> None:
    """Where dealing takes so long that any number of rounds is faster."""
    slow = Link(1.0, 1.0)
    monkeypatch.setitem(NETWORKS, "loopback", replace(NETWORKS["loopback"], to_server=slow))


def ready(connection: Connection, steps: int) -> None:
    """Wait until so many steps are dealt, and nothing more is."""
    wait_until(lambda: connection.prepared == steps)
    thread = connection._session._preparer and connection._session._preparer._thread
    if thread:
        thread.join()
    assert connection.prepared == steps


def arrived(connection: Connection) -> int:
    """Bytes that have come from the dealer."""
    assert connection._session._source is not None
    return connection._session._source.received


def test_an_answer_waits_for_nothing_from_the_dealer(deployed: Deployment, bundles: Path) -> None:
    told: list[str] = []
    with deployed.connection(ahead=PLAN, on_notice=told.append) as connection:
        ready(connection, 6)
        before = arrived(connection)
        assert answered(connection, PROMPT, 3) == (
            decoder.plaintext(bundles, PROMPT, 3),
            [1, 1, 1, 1, 1, 1],  # a step for each token of the prompt
        )
        used = connection._session.steps.ahead.used  # type: ignore[union-attr]
        assert used == 6
        # Six steps took all six; whatever has come since was dealt after the answer.
        ready(connection, 6)
        assert arrived(connection) > before
        said = decoder.plaintext(bundles, PROMPT, 3)
        prompt = [*PROMPT, *said, 8]
        tokens = list(connection.generate(prompt, max_tokens=2))
        assert [t.token for t in tokens] == decoder.plaintext(bundles, prompt, 2)
        assert [(r.new, r.past) for t in tokens for r in t.reports] == [(1, 6), (1, 7), (1, 8)]
    assert told == []


def test_no_dealt_byte_comes_during_an_answer(
    deployed: Deployment, bundles: Path, monkeypatch: Any
) -> None:
    with deployed.connection(ahead=PLAN) as connection:
        ready(connection, 6)
        before = arrived(connection)
        monkeypatch.setattr(Preparer, "start", lambda *_: None)
        assert answered(connection, PROMPT, 3)[0] == decoder.plaintext(bundles, PROMPT, 3)
        assert (arrived(connection), connection.prepared) == (before, 0)
        # And then the answer goes on live.
        said = [*PROMPT, *decoder.plaintext(bundles, PROMPT, 3)]
        assert answered(connection, said, 2) == (decoder.plaintext(bundles, said, 2), [1, 1])
        assert arrived(connection) > before


def test_a_first_step_of_several_tokens(deployed: Deployment, bundles: Path) -> None:
    told: list[str] = []
    plan = AheadPlan(3, prompt=3)
    with deployed.connection(ahead=plan, on_notice=told.append) as connection:
        ready(connection, 4)
        assert answered(connection, PROMPT, 2) == (decoder.plaintext(bundles, PROMPT, 2), [3, 1, 1])
        ready(connection, 4)  # anew, as what was left is no prompt's first step
        assert [step.new for step in connection._session.steps.ahead.steps] == [3, 1, 1, 1]  # type: ignore[union-attr]
        said = [*PROMPT, *decoder.plaintext(bundles, PROMPT, 2)]
        assert told == []
        assert answered(connection, said, 1) == (decoder.plaintext(bundles, said, 1), [1])
        assert len(told) == 1 and told[0].startswith("4 steps that were dealt ahead are thrown")


def test_two_conversations(deployed: Deployment, bundles: Path) -> None:
    """What was dealt for one is thrown away when the other comes, and both go on."""
    told: list[str] = []
    one, two = PROMPT, [9, 3, 3, 1]
    with deployed.connection(ahead=PLAN, on_notice=told.append) as connection:
        for prompt, steps in (
            (one, [1] * 4), (two, [4]), ([*one, 8], [1]), ([*one, 8, 1], [1]), ([*two, 8], [1]),
        ):  # fmt: skip
            ready(connection, 6)
            found = answered(connection, prompt, 1)
            assert found == (decoder.plaintext(bundles, prompt, 1), steps), prompt
    assert len(told) == 3
    assert {line.split(":")[0] for line in told} == {
        "6 steps that were dealt ahead are thrown away"
    }


def test_a_prompt_that_departs_earlier(deployed: Deployment, bundles: Path) -> None:
    told: list[str] = []
    with deployed.connection(ahead=PLAN, on_notice=told.append) as connection:
        for prompt, steps in (([5, 1, 7, 2, 4], [1] * 5), ([5, 1, 7, 8], [1])):
            ready(connection, 6)
            assert answered(connection, prompt, 1) == (
                decoder.plaintext(bundles, prompt, 1), steps
            )  # fmt: skip
    assert len(told) == 1


@pytest.mark.slow
def test_a_slow_network_takes_a_prompt_as_a_whole(
    deployed: Deployment, bundles: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(NETWORKS, "loopback", NETWORKS["wan"])
    told: list[str] = []
    with deployed.connection(ahead=AheadPlan(3, 3), on_notice=told.append) as connection:
        for prompt, steps in (([5, 1, 7], [3]), ([1, 2, 9, 9, 9, 9], [6])):
            ready(connection, 4)
            assert answered(connection, prompt, 1) == (decoder.plaintext(bundles, prompt, 1), steps)
    assert len(told) == 1 and told[0].endswith("or is faster as a whole")


def test_steps_that_took_longer_are_left_out(roles: dict[str, Any]) -> None:
    """What was measured outweighs the model, whichever is faster."""
    with InProcessSession(roles) as run:
        run.step(PROMPT, 0)
        for past in range(4, 9):
            run.deal_ahead(1, past)
        session = run._sessions[CLIENT]
        choice = {True: [1] * 5, False: []}
        for dealt, sizes in choice.items():
            channels = cast("Any", (None, None))
            preparer = Preparer(PLAN, session, channels, cast("Any", None), {"ahead": 1}, print)
            for _ in range(64):
                preparer.learn(1, 1e6 if not dealt else 1.0, True)
                preparer.learn(5, 9e9 if dealt else 1.0, False)
            assert preparer.fitting(Place(), 4, 9, Draw()) == sizes
            assert preparer.fitting(Place(), 5, 9, Draw()) == []  # another text


@pytest.mark.slow
def test_bounds_at_both_ends(bundles: Path) -> None:
    serve = ("--timeout", "8", "--grace", "5", "--prepare-disk")
    with deployment(bundles, serve=(*serve, "50MB")) as made:
        with made.connection(ahead=PLAN) as connection:
            ready(connection, 6)
            sizes = [step.dealt for step in connection._session.steps.ahead.steps]  # type: ignore[union-attr]
        some = sum(size["client"] for size in sizes[:2])
        if some:
            with made.connection(ahead=AheadPlan(6, disk=some)) as connection:
                ready(connection, 2)
    some = sum(size["server"] for size in sizes[:3])
    with deployment(bundles, serve=(*serve, str(some))) as made:
        told: list[str] = []
        with made.connection(ahead=PLAN, on_notice=told.append) as connection:
            assert connection.limits["ahead"] == some
            ready(connection, 3)
            assert answered(connection, PROMPT, 1) == (
                decoder.plaintext(bundles, PROMPT, 1), [1, 1, 1, 1]
            )  # fmt: skip
            # A client that asks for more than the server told it is refused, and goes on.
            ready(connection, 2)  # they have longer caches
            connection._session._preparer._limits = {"ahead": 1 << 40}  # type: ignore[union-attr]
            connection._session._preparer.start(Draw())  # type: ignore[union-attr]
            connection._session._preparer._thread.join()  # type: ignore[union-attr]
            said = [*PROMPT, 3]
            assert answered(connection, said, 1)[0] == decoder.plaintext(bundles, said, 1)
        assert len(told) == 1
        assert "2 steps are dealt ahead, and no more: the server says: it holds no " in told[0]


def test_a_refused_request_takes_no_second_rehearsal() -> None:
    rehearsed: list[tuple[int, int]] = []

    def dealt(new: int, past: int, _: Draw) -> dict[str, int]:
        rehearsed.append((new, past))
        return {"server": 100}

    told: list[Any] = []
    channel = SimpleNamespace(peer="client", send_json=lambda kind, **_: told.append(kind))
    session = SimpleNamespace(present=0, ahead=Ahead(), dealt=dealt)
    parent = SimpleNamespace(ask=lambda **_: [{"wait": 0}])
    program = decoder.program("server")
    settings = SimpleNamespace(limits=Limits(ahead=99), timeout=8)
    none: Any = SimpleNamespace(trouble="")
    ahead = DealtAhead(settings, program, parent, none, session, channel, none, none)  # type: ignore[arg-type]
    for new in (2, 3, 1):
        ahead.deal(memoryview(write_step(new, 0, Draw())))
    assert told == [Kind.REFUSED] * 3
    assert rehearsed == [(2, 0)]


def test_a_server_that_deals_nothing_ahead(bundles: Path) -> None:
    with deployment(bundles, serve=("--timeout", "8", "--grace", "5")) as made:
        told: list[str] = []
        with made.connection(ahead=PLAN, on_notice=told.append) as connection:
            for prompt in (PROMPT, [*PROMPT, 1]):
                assert answered(connection, prompt, 1)[0] == decoder.plaintext(bundles, prompt, 1)
            assert connection.prepared == 0
        assert told == ["nothing is dealt ahead; the server needs --prepare-disk"]
        connection = made.connection()
        connection.open()
        server = connection._peers.channels[0]
        server.send(Kind.AHEAD, write_step(1, 0, Draw()))
        with pytest.raises(PartyError, match="sent frame 21"):
            server.receive_json(Kind.ACCEPTED)


@pytest.mark.parametrize(
    ("new", "past", "place", "reason"),
    [
        (1, 3, Place(), "continue nothing"),
        (0, 0, Place(), "out of turn"),
        (1, -1, Place(), "out of turn"),
        (17, 0, Place(), "out of turn"),
        (1, 0, Place(1, 1), "continue nothing"),
        (1, 0, Place(0, 1), "continue nothing"),
    ],
)
def test_a_client_that_asks_for_what_cannot_come(
    deployed: Deployment, new: int, past: int, place: Place, reason: str
) -> None:
    with deployed.connection() as connection:
        server = connection._peers.channels[0]
        server.send(Kind.AHEAD, write_step(new, past, Draw(), place))
        with pytest.raises(PartyError, match=reason):
            server.receive_json(Kind.ACCEPTED)


@pytest.mark.slow
def test_what_is_thrown_away_counts_as_tokens(bundles: Path) -> None:
    serve = ("--timeout", "8", "--grace", "5", "--prepare-disk", "50MB", "--rate", "14")
    with deployment(bundles, serve=serve) as made:
        told: list[str] = []
        with made.connection(ahead=PLAN, on_notice=told.append) as connection:
            ready(connection, 6)
            assert answered(connection, [9, 9, 9, 9], 1)[1] == [1] * 4
            ready(connection, 6)
            assert answered(connection, [3, 3, 3, 3], 1)[1] == [4]
            with pytest.raises(LimitError):  # 4 + 6 + 4 are used up
                answered(connection, [3, 3, 3, 3, 4], 1)
        assert any("tokens a minute are used up" in line for line in told[1:])


@pytest.mark.slow
def test_a_client_that_leaves_pays_for_what_it_had_dealt(bundles: Path) -> None:
    serve = ("--timeout", "8", "--grace", "5", "--prepare-disk", "50MB", "--rate", "10")
    with deployment(bundles, serve=serve) as made:
        for _ in range(2):
            with made.connection(ahead=PLAN) as connection:
                ready(connection, 6)
            wait_until(lambda: not made.server.workers)
        with made.connection() as connection, pytest.raises(LimitError):
            answered(connection, PROMPT, 1)


def test_dealing_is_interrupted(deployed: Deployment, bundles: Path) -> None:
    """A prompt that comes while steps are dealt, an end of the session, and a person who stops."""

    def failures(role: Role) -> int:
        return sum(line["event"] == "session failed" for line in role.log)

    roles = deployed.roles
    before = {name: failures(run) for name, run in roles.items()}
    for _ in range(3):
        with deployed.connection(ahead=AheadPlan(11)) as connection:
            assert answered(connection, PROMPT, 2)[0] == decoder.plaintext(bundles, PROMPT, 2)
            said = [*PROMPT, 3, 1]
            assert answered(connection, said, 2)[0] == decoder.plaintext(bundles, said, 2)
    with deployed.connection(ahead=PLAN) as connection:
        tokens = connection.generate(PROMPT, max_tokens=9)
        next(tokens)
        tokens.close()
        ready(connection, 6)
        assert answered(connection, [*PROMPT, 2], 1)[0] == decoder.plaintext(
            bundles, [*PROMPT, 2], 1
        )
    for run in roles.values():
        wait_until(lambda run=run: not run.workers)
    assert before == {name: failures(run) for name, run in roles.items()}


def test_a_link_that_breaks_while_steps_are_dealt(bundles: Path) -> None:
    serve = ("--timeout", "8", "--grace", "5", "--prepare-disk", "50MB")
    relay = Relay()
    with deployment(bundles, serve=serve) as made:
        relay.target = made.dealer.address
        told: list[str] = []
        relay.arm([(DOWN, Kind.MARK, 3)], lambda pair: pair.reset())
        options = {"dealer": relay.address, "ahead": PLAN, "on_notice": told.append}
        with made.connection(**options) as connection:
            assert relay.fired.wait(60)
            relay.arm([], lambda pair: None)
            assert answered(connection, PROMPT, 2)[0] == decoder.plaintext(bundles, PROMPT, 2)
            ready(connection, 6)
            said = [*PROMPT, 3]
            assert answered(connection, said, 1)[0] == decoder.plaintext(bundles, said, 1)
        assert len(told) >= 1
        assert told[0].startswith("a new session begins, as the last one ended meanwhile: the ")
        for run in made.roles.values():
            wait_until(lambda run=run: not run.workers)
            failed = [line["reason"] for line in run.log if line["event"] == "session failed"]
            assert all("\n" not in reason and "internal" not in reason for reason in failed)
    relay.close()


def full() -> None:
    """At a server: memory takes nothing of what is dealt ahead, and the disk two blocks of it."""
    from mergec.runtime.roles import server_session

    real, count = Spool.put, 0

    def put(self: Spool, data: np.ndarray) -> Any:
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    Spool.put = put  # type: ignore[method-assign]
    server_session.AHEAD_BYTES = 1


@pytest.mark.slow
def test_a_server_whose_disk_is_full(bundles: Path) -> None:
    serve = ("--timeout", "8", "--grace", "5", "--prepare-disk", "50MB", "--rate", "0")
    with role("deal", bundles, "--plaintext") as dealer:
        at = ("--plaintext", "--dealer", str(dealer.address))
        with role("serve", bundles, *at, *serve, patch=full) as server:
            made = Deployment(bundles, server, dealer)
            told: list[str] = []
            with made.connection(ahead=PLAN, on_notice=told.append) as connection:
                preparer = connection._session._preparer
                assert preparer is not None and preparer._thread is not None
                preparer._thread.join()
                assert 2 <= connection.prepared < 6
                assert answered(connection, PROMPT, 2)[0] == decoder.plaintext(bundles, PROMPT, 2)
            assert len(told) == 1
            assert told[0].endswith("no more: the server says: it cannot hold more; see its log")
            found = server.wait_for("cannot hold what is dealt ahead")
            assert found["reason"] == "No space left on device"


def test_a_client_whose_disk_is_full(deployed: Deployment, bundles: Path, monkeypatch: Any) -> None:
    told: list[str] = []
    with deployed.connection(ahead=PLAN, on_notice=told.append) as connection:
        ready(connection, 6)
        assert answered(connection, PROMPT, 1)[0] == decoder.plaintext(bundles, PROMPT, 1)
        ready(connection, 6)
        connection._session._source.trouble = "No space left on device"  # type: ignore[union-attr]
        said = [*PROMPT, 3]
        assert answered(connection, said, 1)[0] == decoder.plaintext(bundles, said, 1)
        preparer = connection._session._preparer
        assert preparer is not None and preparer._thread is not None
        preparer._thread.join()
        said = [*said, 2]
        assert answered(connection, said, 1)[0] == decoder.plaintext(bundles, said, 1)
    assert told == [
        "5 steps are dealt ahead, and no more: the disk takes no more: No space left on device"
    ]


def test_what_does_not_go_with_it(bundles: Path, deployed: Deployment) -> None:
    with pytest.raises(MergecError, match="leave out either that"):
        deployed.connection(ahead=PLAN, reuse=False)
    with deployed.connection(ahead=PLAN) as connection:
        ready(connection, 6)
        # The next prompt may continue none of these caches, so nothing is dealt for it.
        list(connection.generate(PROMPT, max_tokens=3, fixed_length=True))
        thread = connection._session._preparer and connection._session._preparer._thread
        assert thread is None
        assert answered(connection, [*PROMPT, 1], 1)[0] == decoder.plaintext(
            bundles, [*PROMPT, 1], 1
        )
        with pytest.raises(PromptError):
            answered(connection, [99], 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("4096", 4096), ("0", 0), (" 7 KB ", 7000)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1", "nan", "inf", "1e40", "2 2GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(MergecError, match="is no size"):
        size_of(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prepare-prompt", "12"], "--prepare-prompt needs --prepare-ahead"),
        (["--prepare-ahead", "9", "--speculate", "lookup"], "a step takes several"),
        (["--prepare-ahead", "9", "--fixed-length"], "no prompt continues an answer"),
        (["--speculate", "loop"], "speculate is 'loop'; it can be"),
        ([], "has no chat template"),
    ],
)
def test_options_are_compared_before_anything_is_sent(
    tmp_path: Path, capsys: Any, options: list[str], words: str
) -> None:
    folder = characters.save(tmp_path / "bundles", characters.CHAT if options else None)
    # Nobody listens there: a client that connects says so.
    place = ["--server", "127.0.0.1:1", "--dealer", "127.0.0.1:1", "--plaintext"]
    for command in ("chat", "proxy"):
        if command == "proxy" and ("--fixed-length" in options or not options):
            continue
        assert mergec([command, str(folder), *place, *options]) == 1
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == 1, printed
        assert words in printed[0]
