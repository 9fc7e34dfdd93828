"""The emulated link: bytes and rounds are the wrapped link's, time is the network's."""

from __future__ import annotations

import threading
import time

import torch

from runtime.network import Network
from runtime.transport.emulated import EmulatedLink
from runtime.transport.loopback import link_pair

SLOW = Network(latency=0.05, bandwidth=1e6)


def _play(server, work) -> tuple[float, list[torch.Tensor]]:
    """Run both ends; gives the client's seconds and what it received."""
    thread = threading.Thread(target=server)
    thread.start()
    began = time.monotonic()
    received = work()
    spent = time.monotonic() - began
    thread.join()
    return spent, received


def _message(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int64).to(torch.uint8)


def test_a_round_takes_latency_and_bandwidth() -> None:
    client, server = (EmulatedLink(link, SLOW) for link in link_pair())
    seconds, (reply,) = _play(
        lambda: server.exchange(_message(30_000), 10_000),
        lambda: [client.exchange(_message(10_000), 30_000)],
    )
    assert torch.equal(reply, _message(30_000))
    assert 0.08 <= seconds < 1.0
    assert (client.traffic.rounds, client.traffic.sent, client.traffic.received) == (
        1,
        10**4,
        30_000,
    )
    assert (server.traffic.sent, server.traffic.received) == (30_000, 10**4)


def test_messages_in_a_row_share_the_line_but_not_the_latency() -> None:
    client, server = (EmulatedLink(link, SLOW) for link in link_pair())

    def send() -> None:
        for _ in range(4):
            server.exchange(_message(20_000), 0)

    seconds, received = _play(send, lambda: [client.exchange(None, 20_000) for _ in range(4)])
    assert all(torch.equal(part, _message(20_000)) for part in received)
    assert 0.05 + 4 * 0.02 <= seconds < 4 * 0.07
    assert server.traffic.sent == client.traffic.received == 80_000


def test_sending_waits_for_nobody() -> None:
    client, server = (EmulatedLink(link, SLOW) for link in link_pair())
    seconds, (reply,) = _play(
        lambda: server.exchange(None, 8), lambda: [client.exchange(_message(8), 0)]
    )
    assert reply.numel() == 0
    assert seconds < SLOW.latency
