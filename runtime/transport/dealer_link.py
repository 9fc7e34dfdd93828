"""The dealer's byte stream to one party: blocks, sent ahead of their use."""

from __future__ import annotations

import threading
from collections import deque
from datetime import timedelta
from typing import Protocol

import torch

from runtime.errors import PartyError
from runtime.spec import DEALER
from runtime.transport.communicator import (
    IDLE_TIMEOUT,
    REPLY_TIMEOUT,
    CountingCommunicator,
    peer_errors,
)
from runtime.transport.link import check_payload

BLOCK_BYTES = 1 << 20
"""Small writes are put together into blocks of at least this size."""

AHEAD_BYTES = 256 << 20
"""How much a party takes from the dealer before it is used."""

IN_FLIGHT_BYTES = 32 << 20
"""How much the dealer leaves under way before it waits."""

_END = -1


class BlockWriter(Protocol):
    """Carries whole blocks to the party; `end` says that no more will come."""

    def put(self, block: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class BlockReader(Protocol):
    """Gives the blocks in order; None after the last."""

    def get(self) -> torch.Tensor | None: ...


class DealerSender:
    """The dealer's end of a stream. `sent` counts payload bytes, those still gathered included.

    A tensor that was written must not change any more: it may not have been sent yet.
    """

    def __init__(self, blocks: BlockWriter, block_bytes: int = BLOCK_BYTES) -> None:
        self.sent = 0
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._gathered: list[torch.Tensor] = []
        self._size = 0

    def write(self, data: torch.Tensor) -> None:
        """Append bytes (1-D uint8 on the CPU) to the stream."""
        check_payload(data)
        size = data.numel()
        if not size:
            return
        self.sent += size
        if size >= self._block_bytes:
            self.flush()
            self._blocks.put(data.contiguous())
            return
        self._gathered.append(data)
        self._size += size
        if self._size >= self._block_bytes:
            self.flush()

    def flush(self) -> None:
        """Send what was gathered: the party may be waiting for it."""
        if self._gathered:
            block = torch.cat(self._gathered)
            self._gathered, self._size = [], 0
            self._blocks.put(block)

    def close(self) -> None:
        """Send the rest, and that it was the last."""
        self.flush()
        self._blocks.end()


class DealerReceiver:
    """A party's end of a stream, filled by a thread as far ahead as `ahead_bytes` allow.

    received: payload bytes that have come. consumed: those that were read.
    """

    def __init__(
        self,
        blocks: BlockReader,
        ahead_bytes: int = AHEAD_BYTES,
        timeout: float = REPLY_TIMEOUT,
    ) -> None:
        self.received = 0
        self.consumed = 0
        self._blocks = blocks
        self._timeout = timeout
        self._limit = ahead_bytes
        self._queue: deque[torch.Tensor] = deque()
        self._head = 0
        self._size = 0
        self._ended = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._fill, name="dealer-stream", daemon=True).start()

    def read(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` bytes of the stream, in memory of their own; waits until they came."""
        first = self._first(nbytes)
        if first is not None:
            return first
        result = torch.empty(nbytes, dtype=torch.uint8)
        done = 0
        while done < nbytes:
            with self._changed:
                self._wait()
                block, start = self._queue[0], self._head
                size = min(nbytes - done, block.numel() - start)
                self._advance(size)
            # The queue holds the only other reference, so the copy needs no lock.
            result[done : done + size] = block[start : start + size]
            done += size
        return result

    def _first(self, nbytes: int) -> torch.Tensor | None:
        """The first block as it is, where just that is asked for: large ones are sent alone."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        with self._changed:
            self._wait()
            block = self._queue[0]
            if self._head or block.numel() != nbytes:
                return None
            self._advance(nbytes)
            return block

    def _wait(self) -> None:
        while not self._queue:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise PartyError(
                    "the dealer ended the session while randomness was due; "
                    "see its own message, and start all three again"
                )
            if not self._changed.wait(self._timeout):
                raise PartyError(
                    f"the dealer sent nothing for {self._timeout:g} s; see what it is doing"
                )

    def _advance(self, size: int) -> None:
        self.consumed += size
        self._size -= size
        self._head += size
        if self._head == self._queue[0].numel():
            self._queue.popleft()
            self._head = 0
        self._changed.notify_all()

    def _fill(self) -> None:
        try:
            while (block := self._blocks.get()) is not None:
                with self._changed:
                    # A block larger than the whole limit still has to pass.
                    while self._queue and self._size + block.numel() > self._limit:
                        self._changed.wait()
                    self.received += block.numel()
                    self._queue.append(block)
                    self._size += block.numel()
                    self._changed.notify_all()
        except PartyError as error:
            self._failure = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()


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
