"""A party of several ranks: the same words as one, a share of the memory each, and clear faults."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mergec.runtime.cli import run
from mergec.runtime.core.errors import MergecError, PartyError, RankError
from mergec.runtime.core.spec import ROLES, SERVER
from mergec.runtime.core.values import Sent
from mergec.runtime.engine.executor import Executor
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.engine.trees import Branches
from mergec.runtime.kernels.matmul import matmul, matmul_columns, matmul_rows
from mergec.runtime.kernels.spread import Spread, copy_rows, pick_rows, whole, write_rows
from mergec.runtime.ops.cache_fill import CacheFill
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.ranks.group import Group
from mergec.runtime.ranks.link import Order
from mergec.runtime.ranks.start import Party, start
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.conversations import Place
from tests import decoder
from tests.families import slow
from tests.services import deployment, wait_until
from tests.session import compiled

SEEDS = bytes(range(32)), bytes(range(32, 64))


def words(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform words, with the ends of the ring among them."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
    ends = torch.tensor([-(2**63), 2**63 - 1, -1, 0])
    found.view(-1)[: len(ends)] = ends[: found.numel()]
    return found


def narrow(*shape: int) -> torch.Tensor:
    return words(*shape).to(torch.int32)


@pytest.fixture(scope="module", params=[2, 3])
def party(request: pytest.FixtureRequest) -> Iterator[Party]:
    made = start("server", request.param, threads=1)
    yield made
    made.close()


def spread(group: Group, value: torch.Tensor, axis: int) -> Spread:
    room = group.room(value.shape, value.dtype, axis)
    for place in range(0, value.shape[-2], 3):
        write_rows(room, place, value[..., place : place + 3, :])
    return room


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(6, 4), (7, 5), (1, 2), (2, 1), (64, 33)])
@pytest.mark.parametrize("make", [words, narrow])
def test_products_with_a_weight(
    party: Party, axis: int, shape: tuple[int, int], make: Callable[..., torch.Tensor]
) -> None:
    weight = make(*shape)
    held = spread(party.group, weight, axis)
    assert torch.equal(whole(held), weight)
    for rows in (0, 1, 5):
        x = words(rows, shape[1], seed=1)
        assert torch.equal(matmul_rows(x, held), matmul_rows(x, weight))
        x = words(1, rows, shape[0], seed=2)
        assert torch.equal(matmul_columns(x, held), matmul_columns(x, weight))
        ids = torch.randint(-shape[0], shape[0], (2, rows))
        assert torch.equal(held[ids], weight[ids].long())


@pytest.mark.parametrize("heads", [1, 2, 4, 5])
def test_products_with_a_cache(party: Party, heads: int) -> None:
    """A cache grows, is cut, and is continued in two ways; heads may be fewer than ranks."""
    rows = words(1, heads, 9, 6)
    room = party.group.room((1, heads, 12, 6), torch.int64, 1)
    write_rows(room, 0, rows[..., :4, :])
    write_rows(room, 4, rows[..., 4:, :])
    other = party.group.room((1, heads, 15, 6), torch.int64, 1)
    copy_rows(room.narrow(-2, 0, 5), other)
    write_rows(other, 5, rows[..., 5:7, :])
    for held, length in ((room, 9), (room, 3), (room, 0), (other, 7)):
        cache, plain = held.narrow(-2, 0, length), rows[..., :length, :]
        assert isinstance(cache, Spread)
        for new in (0, 1, 4):
            queries, weights = words(1, heads, new, 6), words(1, heads, new, length)
            turned = cache.transpose(-1, -2)
            assert isinstance(turned, Spread)
            assert torch.equal(matmul(queries, turned), matmul(queries, plain.transpose(-1, -2)))
            assert torch.equal(matmul(weights, cache), matmul(weights, plain))
        assert torch.equal(whole(cache), plain)
        assert torch.equal(whole(cache.transpose(2, 3)), plain.transpose(2, 3))


def test_rows_of_a_cache_move_where_they_lie(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = words(1, 3, 9, 4)
    cache, table = spread(party.group, rows, 1), spread(party.group, words(7, 5), 0)
    with monkeypatch.context() as alone:
        alone.delattr(Group, "whole")
        for held in (cache, rows):
            pick_rows(held, 2, [0, 2, 3, 6])
    assert torch.equal(whole(cache), rows)
    kept = words(1, 3, 9, 4)[..., [0, 1, 2, 4, 5, 8], :]
    assert torch.equal(rows[..., :6, :], kept)
    with pytest.raises(ValueError, match="do not move"):
        pick_rows(table, 0, [0, 2])


@pytest.mark.parametrize("inference", [False, True])
def test_products_and_views_gather_nothing(
    party: Party, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch sends other functions to a tensor in inference mode, in which steps run."""
    table = spread(party.group, words(7, 5), 0)
    cache = spread(party.group, words(1, 3, 9, 4), 1)
    monkeypatch.delattr(Group, "whole")
    with torch.inference_mode(inference):
        assert table[torch.tensor([[6, 0]])].shape == (1, 2, 5)
        part = cache.narrow(-2, 0, 8)[:, :, :7].narrow(2, 0, 6)
        for view in (part, part.transpose(-1, -2), part.detach().transpose(2, 3).transpose(3, 2)):
            assert isinstance(view, Spread)
            assert matmul(words(1, 3, 2, view.shape[-2]), view).shape[-1] == view.shape[-1]
    with torch.inference_mode(not inference):
        assert isinstance(part.narrow(2, 0, 3).transpose(-1, -2), Spread)


def test_a_cache_that_is_filled_at_once_is_spread(party: Party) -> None:
    context = Simulation().contexts[SERVER]
    context.ranks = party.group
    opened, away = words(1, 3, 5, 4), torch.empty((1, 3, 5, 4), dtype=torch.int64, device="meta")
    with pytest.raises(StopIteration) as ended:
        next(CacheFill.protocol(context, Sent(opened, away, 16)))
    kept = ended.value.value
    assert isinstance(kept.opened, Spread)
    assert torch.equal(whole(kept.opened), opened)
    assert kept.mask.is_meta


def test_other_functions_take_the_whole_and_none_may_write(party: Party) -> None:
    value = words(1, 3, 5, 4)
    held = spread(party.group, value, 1)
    assert torch.equal(held.narrow(-2, 1, 3), value.narrow(-2, 1, 3))
    assert torch.equal(held.narrow(1, 0, 2), value.narrow(1, 0, 2))
    assert torch.equal(held.transpose(0, 1), value.transpose(0, 1))
    assert torch.equal(held.transpose(2, 3)[..., 1:], value.transpose(2, 3)[..., 1:])
    assert torch.equal(held + 1, value + 1)
    assert torch.equal(torch.cat([held, value], 2), torch.cat([value, value], 2))
    assert torch.equal(held.reshape(5, 12), value.reshape(5, 12))
    with pytest.raises(TypeError, match="several ranks"):
        held.add_(1)
    with pytest.raises(TypeError, match="several ranks"):
        held[..., :2, :] = 0
    assert "3 ranks" in repr(held) or "2 ranks" in repr(held)


def test_each_rank_holds_its_part_and_drops_what_nobody_refers_to(party: Party) -> None:
    group = party.group
    before = group.held_bytes()
    held = spread(group, words(10, 9), 0), spread(group, narrow(9, 10), 1)
    grown = [now - then for now, then in zip(group.held_bytes(), before, strict=True)]
    assert sum(grown) == 10 * 9 * 8 + 9 * 10 * 4
    assert max(grown) <= -(-10 // group.count) * 9 * 12
    view = held[0].narrow(0, 0, 10)
    del held
    assert sum(group.held_bytes()) - sum(before) == 10 * 9 * 8
    del view
    assert group.held_bytes() == before


# -------------------------------------------------------------------------------- whole programs


class Recorded(InProcessSession):
    """Digests of all that client and server send each other, and of what the dealer sends each."""

    def __init__(self, roles: Mapping[str, RoleProgram], ranks: Mapping[int, Group]) -> None:
        super().__init__(roles, seeds=SEEDS)
        self.digests = [hashlib.sha256() for _ in range(4)]
        for party, group in ranks.items():
            self.executors[party].context.ranks = group
        for link, digest in zip(self._links, self.digests[:2], strict=True):
            link.exchange = self._noted(link.exchange, digest)  # type: ignore[method-assign]
        for sender, digest in zip(self._senders, self.digests[2:], strict=True):
            sender.write = self._noted(sender.write, digest)  # type: ignore[method-assign]

    @staticmethod
    def _noted(send: Callable[..., Any], digest: Any) -> Callable[..., Any]:
        def noted(data: torch.Tensor | None, *more: Any) -> Any:
            if data is not None:
                digest.update(data.numpy().tobytes())
            return send(data, *more)

        return noted


def transcript(
    roles: Mapping[str, RoleProgram], ranks: Mapping[int, Group]
) -> tuple[list[str], list[torch.Tensor]]:
    """What is sent in a prompt, steps, a roll-back and a conversation's second continuation, and
    where a program checks drafts, in a tree and behind a path of it."""
    with Recorded(roles, ranks) as session:
        for party, group in ranks.items():
            check_shares(group, session.executors[party])
        logits = [session.step([5, 1, 7], 0), session.step([2], 3), session.step([4, 3], 4)]
        logits += [session.step([6], 5), session.step([9], 6)]
        session.turn_to(Place(1, 0))
        logits += [session.step([8], 2)]
        session.turn_to(Place(0, 0))
        logits += [session.step([8], 7)]
        if roles[ROLES[SERVER]].manifest.speculate_up_to:
            session.rows([1, 2, 3], 8, Branches((), (0, 0)))
            logits += [session.rows([4], 10, Branches((0, 2)))]
        for party in ranks:
            for cache in session._sessions[party]._caches.values():
                parts = [part for part in (cache.opened, cache.mask) if not part.is_meta]
                assert parts
                assert all(isinstance(part, Spread) and part.held.axis == 1 for part in parts)
        return [digest.hexdigest() for digest in session.digests], logits


def check_shares(group: Group, executor: Executor) -> None:
    """Every matrix is spread, and each rank holds its part of the words and no more."""
    spread = [word for word in held_words(executor) if isinstance(word, Spread)]
    assert len(spread) > 3
    assert all(word.dim() != 2 or isinstance(word, Spread) for word in held_words(executor))
    held = {id(word.held): word.held for word in spread}.values()
    whole = sum(math.prod(of.shape) * of.part.itemsize for of in held)
    # Splits that do not come out even give a rank up to one more row, column or head.
    most = sum(
        math.prod(of.shape) // of.shape[of.axis] * -(-of.shape[of.axis] // group.count)
        * of.part.itemsize
        for of in held
    )  # fmt: skip
    assert max(group.held_bytes()) <= most
    assert sum(group.held_bytes()) == whole


def held_words(executor: Executor) -> Iterator[torch.Tensor]:
    for weight in executor._constants.weights.values():
        fields = (
            getattr(weight, name, None) for name in ("encoded", "difference", "opened", "mask")
        )
        yield from (
            words for words in fields if isinstance(words, torch.Tensor) and not words.is_meta
        )


@functools.cache
def program(name: str) -> Mapping[str, RoleProgram]:
    """A program's roles: a handwritten decoder, or a tiny one of a family with options."""
    if name == "handwritten":
        return {role: decoder.program(role, speculate_up_to=2) for role in ROLES}
    family, _, options = name.partition(" ")
    return compiled(family, **dict([options.split("=")] if options else []))[1].roles


@functools.cache
def expected(name: str) -> tuple[list[str], list[torch.Tensor]]:
    return transcript(program(name), {})


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "name", ["handwritten", *slow("llama", "gpt2", "gpt2 weights=shared", "gpt2 preset=merge-mm")]
)
def test_a_role_of_several_ranks_sends_the_same_words(party: Party, name: str, role: str) -> None:
    digests, logits = transcript(program(name), {ROLES.index(role): party.group})
    assert digests == expected(name)[0]
    for one, other in zip(logits, expected(name)[1], strict=True):
        assert torch.equal(one, other)


# --------------------------------------------------------------------------------------- faults


def other_ranks(parent: int, below: bool = True) -> list[psutil.Process]:
    """The processes of ranks but the first that a process, or one `below` it, has started."""
    found = []
    for child in psutil.Process(parent).children(recursive=below):
        with suppress(psutil.Error):  # it has just ended
            found += [child] if "mergec.runtime.ranks.process" in " ".join(child.cmdline()) else []
    return found


def all_gone(pids: Iterable[int], timeout: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


@contextmanager
def fresh(count: int = 3, timeout: float = 60.0) -> Iterator[Party]:
    made = start("dealer", count, threads=1, timeout=timeout)
    pids = list(made.pids.values())
    try:
        yield made
    finally:
        made.close()
    assert all_gone(pids)


def test_a_killed_rank_is_named_and_ends_the_others() -> None:
    with fresh() as made:
        held = spread(made.group, words(6, 4), 0)
        os.kill(made.pids[2], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RankError) as caught:
            for _ in range(3):
                matmul_rows(words(1, 4), held)
        assert time.monotonic() - began < 20
        assert str(caught.value) == (
            "rank 2 of the dealer was ended by SIGKILL (out of memory?); all its ranks were stopped"
        )
    with pytest.raises(RankError, match="the ranks of the dealer have ended"):
        _ = made.group


def test_a_rank_that_raises_is_named_with_the_kind_of_its_error_and_no_value() -> None:
    with fresh(2) as made:
        held = spread(made.group, words(6, 4), 0)
        # The parts of the others are lost; rank 0's numbers now mean nothing to them.
        made.group._tell(Order.DROP, 1, held.held.number)
        with pytest.raises(RankError) as caught:
            for _ in range(3):
                matmul_rows(words(1, 4), held)
        shown = (
            r"rank 1 of the dealer failed: KeyError at process\.py:\d+; all its ranks were stopped"
        )
        assert re.fullmatch(shown, str(caught.value))


@pytest.mark.slow
def test_a_rank_that_stops_is_waited_for_as_long_as_was_said() -> None:
    # It is how long a start may take as well.
    with fresh(2, timeout=30.0) as made:
        held = spread(made.group, words(6, 4), 0)
        os.kill(made.pids[1], signal.SIGSTOP)
        with pytest.raises(RankError, match="rank 1 of the dealer did not answer"):
            matmul_rows(words(1, 4), held)


def test_a_rank_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergec.runtime.ranks.start.PROCESS", "mergec.runtime.ranks.missing")
    with pytest.raises(RankError, match=r"rank 1 of the server ended with code 1: .*missing"):
        start("server", 2, threads=1)


def test_a_rank_that_never_starts_is_not_waited_for_forever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "asleep.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("mergec.runtime.ranks.start.PROCESS", "asleep")
    with pytest.raises(RankError, match=r"rank 1 of the server did not start within 0\.5 s"):
        start("server", 2, threads=1, timeout=0.5)


def test_each_rank_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(MergecError, match="this machine has 1; lower --ranks"):
        start("server", 2, "cuda")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("bundles"), max_length=2**20)


class Watched:
    """The processes of a local run. act: called with those of the roles at the first token."""

    def __init__(self, act: Callable[[Mapping[str, int]], object]) -> None:
        self.pids: dict[str, int] = {}
        self.ranks: list[int] = []
        self._act = act

    def hear(self, role: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "loaded":
            self.pids[role] = event["pid"]
        if event["event"] == "token" and not self.ranks:
            self.ranks += [child.pid for of in self.pids.values() for child in other_ranks(of)]
            self._act(self.pids)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_three_processes_of_several_ranks_say_what_plaintext_says(
    bundles: Path, ranks: int
) -> None:
    result = run_local(bundles, [5, 1, 7], max_tokens=4, ranks=ranks)
    assert result.tokens == decoder.plaintext(bundles, [5, 1, 7], 4)


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_a_killed_rank_ends_the_run_with_its_role_and_number(bundles: Path, role: str) -> None:
    def kill(pids: Mapping[str, int]) -> None:
        (victim,) = other_ranks(pids[role])
        victim.kill()

    run = Watched(kill)
    with pytest.raises(RankError, match=f"rank 1 of the {role} was ended by SIGKILL") as caught:
        run_local(bundles, [5, 1, 7], max_tokens=10_000, ranks=2, on_event=run.hear)
    assert "\n" not in str(caught.value)
    assert len(run.ranks) == 3
    assert all_gone([*run.ranks, *run.pids.values()])


@pytest.mark.slow
def test_a_killed_party_takes_its_ranks_and_the_peers_along(bundles: Path) -> None:
    run = Watched(lambda pids: os.kill(pids["server"], signal.SIGKILL))
    with pytest.raises(PartyError, match="the server was ended by SIGKILL"):
        run_local(bundles, [5, 1, 7], max_tokens=10_000, ranks=2, on_event=run.hear)
    assert len(run.ranks) == 3
    assert all_gone(run.ranks)


def test_stock_protocols_have_one_rank(bundles: Path) -> None:
    with pytest.raises(MergecError, match="run on one rank"):
        run_local(bundles, [1], mode="crypten", ranks=2)


@pytest.mark.slow
def test_services_and_their_client_may_have_ranks(bundles: Path, tmp_path: Path) -> None:
    """Also with masked weights that the client keeps; a killed rank ends one session alone."""
    key = tmp_path / "key"
    key.write_text("5" * 64)
    expected = decoder.plaintext(bundles, [5, 1, 7], 4)
    ranks = ("--ranks", "2")
    with deployment(bundles, serve=(*ranks, "--store-key", str(key)), deal=ranks) as made:
        received = []
        for _ in range(2):
            before = other_ranks(os.getpid(), below=False)
            with made.connection(ranks=3, keep=tmp_path / "kept") as connection:
                ranks_of = set(other_ranks(os.getpid(), below=False)) - set(before)
                assert len(ranks_of) == 2
                answer = connection.generate([5, 1, 7], max_tokens=4)
                assert [token.token for token in answer] == expected
                # What was kept, each rank maps; whether pages are resident is up to the system.
                for rank in ranks_of:
                    mapped = any("/kept/" in m.path for m in rank.memory_maps())
                    assert mapped is bool(received)
                received += [connection.setup.received if connection.setup else 0]
            assert not any(rank.is_running() for rank in ranks_of)
        assert received[1] == 0 < received[0]
        with made.connection() as connection:
            answer = connection.generate([5, 1, 7], max_tokens=100)
            next(answer)
            (victim,) = other_ranks(made.server.process.pid)
            victim.kill()
            with pytest.raises(PartyError, match="the server says: it cannot go on; see its log"):
                list(answer)
        failed = made.server.wait_for("session failed")
        assert failed["reason"].startswith("rank 1 of the server was ended by SIGKILL")
        with made.connection() as connection:
            answer = connection.generate([5, 1, 7], max_tokens=4)
            assert [token.token for token in answer] == expected
        services = [made.server.process.pid, made.dealer.process.pid]
        wait_until(lambda: not any(other_ranks(pid) for pid in services))


def test_masks_that_are_expanded_have_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["deal", "bundles", "--expand-masks", "--ranks", "2"]) == 1
    assert "give one of it and --ranks" in capsys.readouterr().err
