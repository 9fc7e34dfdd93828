"""The dealer's byte stream to one party: blocks, sent ahead of their use."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from mergec.runtime.core.errors import PartyError, PeerEndedError
from mergec.runtime.transport.channel import REPLY_TIMEOUT, Channel
from mergec.runtime.transport.frames import MAX_BLOCK, Kind, check_payload
from mergec.runtime.transport.spool import Spool, Spooled

BLOCK_BYTES = 1 << 20
"""Small writes are combined into blocks of at least this size."""

FIRST_BYTES = 1 << 13
"""The same for the first block after a flush, for which the parties wait. Each is twice as large as
the one before, up to `BLOCK_BYTES`."""

AHEAD_BYTES = 256 << 20
"""Bytes that a party receives from the dealer ahead of their use."""


_NOTHING = np.empty(0, np.uint8)
_WORD = 8


class BlockWriter(Protocol):
    """Sends whole blocks to the party; `end` announces that no more will follow."""

    def put(self, block: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class BlockReader(Protocol):
    """Returns the blocks in order; an empty one for a mark, and None after the last."""

    def get(self) -> torch.Tensor | None: ...

    def deadline(self, since: float, limit: float) -> float:
        """When a dealer that has been waited for `since` then is silent for too long."""

    def silent(self, since: float, limit: float) -> PartyError:
        """The error for that."""


class DealerSender:
    """The dealer's end of a stream. `sent` counts payload bytes, including those not yet flushed.

    A written tensor must not be modified afterwards, because it may not have been sent yet.
    """

    def __init__(self, blocks: BlockWriter, block_bytes: int = BLOCK_BYTES) -> None:
        self.sent = 0
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._due = self._first = min(FIRST_BYTES, block_bytes)
        self._gathered: list[torch.Tensor] = []
        self._size = 0
        self._streams = [self]

    def keep_pace(self, other: DealerSender) -> None:
        """Let each of two streams send what it has gathered whenever the other sends a block.

        The parties use both at the same time. One that is sent little would wait for its words
        until the other was sent all of a step.
        """
        self._streams, other._streams = [self, other], [other, self]

    def write(self, data: torch.Tensor) -> None:
        """Append bytes (1-D uint8 on the CPU) to the stream."""
        check_payload(data)
        size = data.numel()
        if not size:
            return
        self.sent += size
        if size >= self._block_bytes:
            self._send()
            self._blocks.put(data.contiguous())
            return
        self._gathered.append(data)
        self._size += size
        if self._size >= self._due:
            self._due = min(2 * self._due, self._block_bytes)
            self._send()

    def flush(self) -> None:
        """Send the bytes gathered so far: the party may be waiting for them."""
        self._send()
        for stream in self._streams:
            stream._due = stream._first

    def _send(self) -> None:
        for stream in self._streams:
            stream._put()

    def _put(self) -> None:
        if self._gathered:
            block = torch.cat(self._gathered)
            self._gathered, self._size = [], 0
            self._blocks.put(block)

    def close(self) -> None:
        """Send the rest, and mark the end of the stream."""
        self.flush()
        self._blocks.end()

    def abandon(self) -> None:
        """End the stream without the rest, because nobody reads it any more."""
        self._blocks.end()


class DealerReceiver:
    """A party's end of a stream, filled by a thread up to `ahead_bytes` ahead of its use.

    received: payload bytes that have arrived. consumed: payload bytes that were read or skipped.

    With a spool it also takes what is dealt long before its use (`expect`), for which memory may
    not suffice.
    """

    def __init__(
        self,
        blocks: BlockReader,
        ahead_bytes: int = AHEAD_BYTES,
        timeout: float = REPLY_TIMEOUT,
        spool: Spool | None = None,
    ) -> None:
        self.received = 0
        self.consumed = 0
        self.trouble = ""
        """Why nothing more can be spooled; what was due by then is in memory."""
        self._blocks = blocks
        self._timeout = timeout
        self._limit = ahead_bytes
        self._spool = spool
        self._due = self._marks = self._awaited = 0
        self._queue: deque[torch.Tensor | Spooled] = deque()
        self._block = _NOTHING
        self._kept = 0
        """Bytes of the block that memory is counted for."""
        self._base = self._head = 0
        self._size = 0
        self._ended = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._fill, name="dealer-stream", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether the stream has ended."""
        return self._ended

    def read(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` bytes of the stream, which nothing else refers to; blocks until there.

        They are aligned to words of 8 bytes. Raises PeerSilentError after `timeout` seconds without
        a block or a heartbeat that counts, PeerEndedError if the stream ends first, and the
        reader's PartyError if it failed.
        """
        start, stop = self._head, self._head + nbytes
        if stop < self._block.nbytes:
            # Most reads are small, and end within a block that no other thread accesses.
            self._head = stop
            self.consumed += nbytes
            found = self._block[start:stop]
            return torch.from_numpy(found.copy() if (self._base + start) % _WORD else found)
        if nbytes and self._block is _NOTHING:
            self._next()
            if self._block.nbytes == nbytes:
                # Large writes are sent as blocks of their own, and need no copy.
                whole = self._block
                self._advance(nbytes)
                return torch.from_numpy(whole)
        result = np.empty(nbytes, np.uint8)
        done = 0
        while done < nbytes:
            if self._block is _NOTHING:
                self._next()
            size = min(nbytes - done, self._block.nbytes - self._head)
            result[done : done + size] = self._block[self._head : self._head + size]
            self._advance(size)
            done += size
        return torch.from_numpy(result)

    def skip(self, nbytes: int) -> None:
        """Pass over the next `nbytes` bytes of the stream; blocks and raises as `read` does."""
        while nbytes:
            if self._block is _NOTHING:
                with self._changed:
                    self._wait()
                    first = self._queue[0]
                    if isinstance(first, Spooled) and first.nbytes <= nbytes:
                        if self._spool is not None:
                            self._spool.drop(first)
                        self._queue.popleft()
                        self.consumed += first.nbytes
                        nbytes -= first.nbytes
                        continue
                self._next()
            size = min(nbytes, self._block.nbytes - self._head)
            self._advance(size)
            nbytes -= size

    def expect(self, nbytes: int) -> None:
        """Note, before the dealer is asked, that the next `nbytes` bytes and a mark come now, and
        are used some time later: what memory has no room for is spooled."""
        with self._changed:
            self._due += nbytes
            self._awaited += 1

    def await_marks(self) -> None:
        """Wait for all that `expect` announced; raises as `read` does, if the stream ends first."""
        with self._changed:
            self._await(lambda: self._marks >= self._awaited or self._ended)
            if self._marks < self._awaited:
                self._wait_ended()

    def finish(self) -> None:
        """Wait until the dealer ends the stream, after all of it has been read."""
        with self._changed:
            self._await(lambda: self._ended)
        if self._failure is not None:
            raise self._failure

    def _await(self, ready: Callable[[], object]) -> None:
        """Wait for a state of the stream; raises PeerSilentError if the dealer is silent."""
        since = time.monotonic()
        while not ready():
            left = self._blocks.deadline(since, self._timeout) - time.monotonic()
            if left <= 0:
                raise self._blocks.silent(since, self._timeout)
            self._changed.wait(left)

    def _next(self) -> None:
        with self._changed:
            self._wait()
            first = self._queue.popleft()
            if not isinstance(first, Spooled):
                self._block = first.numpy()
                self._kept = self._block.nbytes
            elif self._spool is not None:
                self._block, self._kept = self._spool.take(first), 0
            self._base = self._block.ctypes.data

    def _advance(self, size: int) -> None:
        """Advance in the block; at its end, make room for another one."""
        self.consumed += size
        self._head += size
        if self._head == self._block.nbytes:
            with self._changed:
                self._size -= self._kept
                self._block, self._head = _NOTHING, 0
                self._changed.notify_all()

    def _wait(self) -> None:
        self._await(lambda: self._queue or self._ended)
        if not self._queue:
            self._wait_ended()

    def _wait_ended(self) -> None:
        """Raise what ended the stream."""
        if self._failure is not None:
            raise self._failure
        raise PeerEndedError(
            "the dealer ended the session before it had sent all randomness; "
            "see its error message, and start all three roles again"
        )

    def _fill(self) -> None:
        try:
            while (block := self._blocks.get()) is not None:
                with self._changed:
                    self._take(block)
                    self._changed.notify_all()
        except PartyError as error:
            self._failure = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take(self, block: torch.Tensor) -> None:
        size = block.numel()
        if not size:
            self._marks += 1
            return
        ahead = self._due > 0
        # A block larger than the whole limit must still pass.
        while not ahead and self._size and self._size + size > self._limit:
            self._changed.wait()
        self.received += size
        self._due -= size if ahead else 0
        large = self._size + size > self._limit
        if ahead and large and self._spool is not None and not self.trouble:
            try:
                self._queue.append(self._spool.put(block.numpy()))
                return
            except OSError as error:
                self.trouble = error.strerror or "it cannot be written"
        self._queue.append(block)
        self._size += size


class ChannelBlockWriter:
    """Sends blocks as frames of a channel, split to the length that the reader allows."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def put(self, block: torch.Tensor) -> None:
        data = block.numpy().data
        for start in range(0, data.nbytes, MAX_BLOCK):
            self._channel.send(Kind.BLOCK, data[start : start + MAX_BLOCK])
        self._channel.traffic.offline_sent += data.nbytes

    def end(self) -> None:
        self._channel.send(Kind.END)


class ChannelBlockReader:
    """The party's end of a `ChannelBlockWriter`."""

    def __init__(self, channel: Channel, idle_timeout: float) -> None:
        self._channel = channel
        self._idle = idle_timeout

    def get(self) -> torch.Tensor | None:
        # Between two answers the dealer has nothing to send.
        kinds = (Kind.BLOCK, Kind.MARK, Kind.END)
        kind, payload = self._channel.receive_any(kinds, MAX_BLOCK, self._idle)
        if kind is Kind.END:
            return None
        if kind is Kind.MARK:
            return torch.empty(0, dtype=torch.uint8)
        if not payload.nbytes:
            raise PartyError(f"the {self._channel.peer} sent an empty block")
        self._channel.traffic.offline_received += payload.nbytes
        return torch.frombuffer(payload, dtype=torch.uint8)

    def deadline(self, since: float, limit: float) -> float:
        return self._channel.deadline(since, limit)

    def silent(self, since: float, limit: float) -> PartyError:
        return self._channel.silent(since, limit)
