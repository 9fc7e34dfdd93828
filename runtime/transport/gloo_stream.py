"""The dealer's byte stream over gloo, for `runtime.party`."""

from __future__ import annotations

from collections import deque
from datetime import timedelta

import torch

from runtime.spec import DEALER
from runtime.transport.communicator import IDLE_TIMEOUT, CountingCommunicator, peer_errors
from runtime.transport.dealer_link import AHEAD_BYTES, DealerReceiver, DealerSender

IN_FLIGHT_BYTES = 32 << 20
"""How much the dealer leaves under way before it waits."""

_END = -1


class GlooBlockWriter:
    """Blocks over the dealer's own connection to a party: the length, then the bytes."""

    def __init__(self, communicator: CountingCommunicator, party: int) -> None:
        self._communicator = communicator
        self._group = communicator.stream_groups[party]
        self._party = party
        self._pending: deque[tuple[torch.Tensor, object]] = deque()
        self._in_flight = 0

    def put(self, block: torch.Tensor) -> None:
        self._send(torch.tensor([block.numel()]))
        self._send(block)
        self._communicator.traffic.offline_sent += block.numel()
        self._settle(IN_FLIGHT_BYTES)

    def end(self) -> None:
        self._send(torch.tensor([_END]))
        self._settle(0)

    def _send(self, data: torch.Tensor) -> None:
        with peer_errors(self._party):
            self._pending.append((data, self._group.send([data], 0, 0)))
        self._in_flight += data.numel()

    def _settle(self, limit: int) -> None:
        """Wait for the oldest until no more than `limit` bytes are under way."""
        while self._pending and self._in_flight > limit - (not limit):
            data, work = self._pending.popleft()
            self._communicator.wait(self._party, work)
            self._in_flight -= data.numel()


class GlooBlockReader:
    """The party's end of the dealer's connection."""

    def __init__(self, communicator: CountingCommunicator) -> None:
        self._communicator = communicator
        self._group = communicator.stream_groups[communicator.rank]

    def get(self) -> torch.Tensor | None:
        # Between two prompts the dealer has nothing to send.
        length = self._receive(torch.empty(1, dtype=torch.int64))
        size = int(length)
        if size == _END:
            return None
        block = self._receive(torch.empty(size, dtype=torch.uint8))
        self._communicator.traffic.offline_received += size
        return block

    def _receive(self, into: torch.Tensor) -> torch.Tensor:
        with peer_errors(DEALER, IDLE_TIMEOUT):
            self._group.recv([into], 1, 0).wait(timedelta(seconds=IDLE_TIMEOUT))
        return into


def dealer_sender(communicator: CountingCommunicator, party: int) -> DealerSender:
    """The dealer's stream to `party`."""
    return DealerSender(GlooBlockWriter(communicator, party))


def dealer_receiver(
    communicator: CountingCommunicator, ahead_bytes: int = AHEAD_BYTES
) -> DealerReceiver:
    """This party's stream from the dealer."""
    return DealerReceiver(GlooBlockReader(communicator), ahead_bytes, communicator.timeout)
