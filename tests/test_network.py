"""The emulated link: bytes and rounds are the wrapped link's, time is the network's."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from mergec.runtime.core.errors import PartyError
from mergec.runtime.core.messages import Message, Swap, ToClient, ToServer
from mergec.runtime.core.network import Link, Network
from mergec.runtime.core.spec import CLIENT
from mergec.runtime.engine.rehearsal import (
    Form,
    Rehearsal,
    exchanged,
    latencies,
    step_cost,
)
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.transport import emulated
from mergec.runtime.transport.emulated import EmulatedBlocks, EmulatedLink
from mergec.runtime.transport.loopback import link_pair
from tests.session import compiled

SLOW = Link(latency=0.05, bandwidth=1e6)


class Clock(threading.local):
    """Replaces `time`: sleeping advances the clock of the sleeping thread."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock()
    monkeypatch.setattr(emulated, "time", stand_in)
    return stand_in


def _play(server, work) -> list[torch.Tensor]:
    """Run both ends, the client's in this thread; returns what the client received."""
    thread = threading.Thread(target=server)
    thread.start()
    received = work()
    thread.join()
    return received


def _message(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int64).to(torch.uint8)


def test_a_round_takes_latency_and_bandwidth(clock: Clock) -> None:
    client, server = (EmulatedLink(link, SLOW) for link in link_pair())
    (reply,) = _play(
        lambda: server.exchange(_message(30_000), 10_000),
        lambda: [client.exchange(_message(10_000), 30_000)],
    )
    assert torch.equal(reply, _message(30_000))
    assert clock.now == pytest.approx(0.08)
    assert (client.traffic.rounds, client.traffic.sent, client.traffic.received) == (
        1,
        10**4,
        30_000,
    )
    assert (server.traffic.sent, server.traffic.received) == (30_000, 10**4)


def test_messages_in_a_row_share_the_line_but_not_the_latency(clock: Clock) -> None:
    client, server = (EmulatedLink(link, SLOW) for link in link_pair())

    def send() -> None:
        for _ in range(4):
            server.exchange(_message(20_000), 0)

    received = _play(send, lambda: [client.exchange(None, 20_000) for _ in range(4)])
    assert all(torch.equal(part, _message(20_000)) for part in received)
    assert clock.now == pytest.approx(0.05 + 4 * 0.02)
    assert server.traffic.sent == client.traffic.received == 80_000


def test_sending_waits_for_nobody(clock: Clock) -> None:
    client, server = (EmulatedLink(link, SLOW) for link in link_pair())
    (reply,) = _play(lambda: server.exchange(None, 8), lambda: [client.exchange(_message(8), 0)])
    assert reply.numel() == 0
    assert clock.now == 0.0


def _rounds(*kinds: type[Message] | None) -> list[list[Form]]:
    """A message of each kind in a round of its own; None for one without words."""
    sizes = [(Swap, 0) if kind is None else (kind, 3) for kind in kinds]
    return [[Form(kind, torch.int64, (2, size))] for kind, size in sizes]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((), 0),
        ((Swap,) * 3, 3),
        ((ToServer,) * 3, 0),  # nothing comes back
        ((ToClient,) * 3, 1),
        ((None, Swap, None), 1),
        ((ToServer, Swap, Swap), 2),
        ((ToServer, Swap, Swap, Swap), 4),
        ((ToServer, Swap, Swap, ToServer, Swap, Swap), 4),
        ((ToServer, Swap, ToServer, Swap), 4),
        ((ToServer, Swap, ToClient, Swap), 2),  # the server was ahead, and the client follows
        ((Swap, ToClient, Swap), 2),
        ((Swap, ToServer, Swap), 3),
    ],
)
def test_latencies_of_rounds(kinds: tuple[type[Message] | None, ...], expected: int) -> None:
    assert latencies(_rounds(*kinds)) == expected


LINE = Link(latency=100.0, bandwidth=1.0)
"""On which a word of `_rounds` takes 8 seconds, and each of its messages 48."""


@pytest.mark.parametrize(
    ("kinds", "seconds"),
    [
        ((), 0),
        ((Swap,), 148),
        ((Swap,) * 3, 3 * 148),
        ((None, ToClient), 148),
        ((ToClient,) * 3, 100 + 3 * 48),  # they follow each other on the line
        ((ToServer, Swap), 2 * 148),  # the server sends when it has the first
        # The server knows the second at 196, when its own second has just left.
        ((ToServer, Swap, Swap), 196 + 148),
        # The client answers with its third from 296 on; it arrives at 444.
        ((ToServer, Swap, Swap, Swap), 296 + 2 * 148),
    ],
)
def test_seconds_of_rounds(kinds: tuple[type[Message] | None, ...], seconds: float) -> None:
    assert exchanged([[forms] for forms in _rounds(*kinds)], LINE) == seconds


def test_pieces_share_the_line_and_the_latency() -> None:
    (one,), two = _rounds(Swap), _rounds(Swap, Swap)
    assert exchanged([[one, one]], LINE) == 100 + 2 * 48
    # The second turn of a piece follows when its own message is there, 48 s before the other's.
    assert exchanged([[one, one]] * 3, LINE) == 3 * 148 + 48
    assert exchanged([[one, []], [one, one], [[], one]], LINE) == 148 + 148 + 48 + 148
    assert exchanged([[forms] for forms in two], LINE) == 2 * 148
    short = Link(latency=1.0, bandwidth=1.0)
    # The line carries something all the time.
    assert exchanged([[one, one]] * 3, short) == 6 * 48 + 1


@pytest.mark.parametrize("network", ["loopback", pytest.param("wan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("link", [Link(1.0, math.inf), Link(1.0, 2e3)])
@pytest.mark.parametrize("fed", [[2], [2, 9, 4, 1]])
def test_a_step_waits_for_its_latencies(
    clock: Clock, network: str, link: Link, fed: list[int]
) -> None:
    _, program = compiled("llama", network=network)
    rehearsal = Rehearsal(program.any_role)
    rounds = rehearsal.step(len(fed), 3)
    assert latencies(rounds) < len(rounds)
    ends: dict[int, float] = {}
    with InProcessSession(program.roles, emulated=link) as run:
        run.step([5, 1, 7], 0)

        def timed(party: int) -> None:
            clock.now = start
            run._sessions[party].step(len(fed), 3, fed if party == CLIENT else None)
            ends[party] = clock.now

        start = 1e4  # later than any role's time now
        run._all(timed)
    took = ends[CLIENT] - start
    assert took == pytest.approx(exchanged([[forms] for forms in rounds], link), rel=1e-9)
    waiting = step_cost(rehearsal, len(fed), 3).waiting(Network(link, SLOW, SLOW, overhead=0.0))
    assert waiting.latencies == latencies(rounds)
    assert waiting.prepared == pytest.approx(took, rel=1e-9)
    assert math.isfinite(link.bandwidth) or took == latencies(rounds)


class Blocks:
    """A dealer's blocks of these sizes; `None` is a pause of a second."""

    def __init__(
        self, clock: Clock, sizes: list[int | None], failure: PartyError | None = None
    ) -> None:
        self.clock, self.sizes, self.failure = clock, sizes, failure

    def get(self) -> torch.Tensor | None:
        while self.sizes:
            size = self.sizes.pop(0)
            if size is not None:
                return _message(size)
            self.clock.now += 1.0
        if self.failure is not None:
            raise self.failure
        return None

    def deadline(self, since: float, limit: float) -> float:
        return since + limit

    def silent(self, since: float, limit: float) -> PartyError:
        return PartyError(f"silent for {limit:g} s")


def test_a_dealer_s_blocks_share_the_line_and_their_latency(clock: Clock) -> None:
    blocks = EmulatedBlocks(Blocks(clock, [20_000, 30_000, None, 10_000]), SLOW)
    arrived = []
    while (block := blocks.get()) is not None:
        arrived.append((block.numel(), round(clock.now, 9)))
    # The second is on the way right behind the first; the third is sent after a pause.
    assert arrived == [(20_000, 0.07), (30_000, 0.1), (10_000, 1.06)]


def test_a_slowed_stream_fails_like_its_own(clock: Clock) -> None:
    blocks = EmulatedBlocks(Blocks(clock, [8], PartyError("the dealer ended")), SLOW)
    assert blocks.get() is not None
    with pytest.raises(PartyError, match="the dealer ended"):
        blocks.get()


def test_a_slowed_stream_is_silent_like_its_own(clock: Clock) -> None:
    blocks = EmulatedBlocks(Blocks(clock, []), SLOW)
    assert blocks.get() is None
    assert blocks.deadline(3.0, 4.0) == 7.0
    assert str(blocks.silent(0.0, 4.0)) == "silent for 4 s"
