"""Links that are as slow as those of an emulated network: for measurements on one machine.

Sessions never use it unless asked to. Both ends must wrap their link, and run on one machine: the
transfer time of a message is measured from when it was sent, by the machine's monotonic clock.
"""

from __future__ import annotations

import struct
import threading
import time
from queue import Queue

import torch

from mergec.runtime.core.errors import PartyError
from mergec.runtime.core.network import Link
from mergec.runtime.transport.dealer_link import BlockReader
from mergec.runtime.transport.traffic import Exchange, Traffic

_STAMP = struct.Struct("<d")
_NOTHING = torch.empty(0, dtype=torch.uint8)
_BLOCKS = 256
"""Blocks that are on the way at once."""


class _Line:
    """One direction of a link: what is sent waits for what was sent before."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free = 0.0

    def wait(self, sent: float, size: int) -> None:
        """Sleep until `size` bytes would have arrived that were sent at this time."""
        self._free = max(self._free, sent) + size / self._link.bandwidth
        time.sleep(max(0.0, self._free + self._link.latency - time.monotonic()))


class EmulatedLink:
    """Delivers a message when the link would: after the transfer of its bytes, and the latency.

    Each message carries its send time, 8 bytes that are not counted as traffic. A message waits for
    the previous one in its direction, as both share the line; the two directions do not wait for
    each other. No overhead is added, because this machine has its own.
    """

    def __init__(self, link: Exchange, emulated: Link) -> None:
        self._link = link
        self._incoming = _Line(emulated)

    @property
    def traffic(self) -> Traffic:
        return self._link.traffic

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor:
        """Like the wrapped link's, but delayed."""
        reply = self._link.exchange(self._stamped(outgoing), _with_stamp(incoming))
        return self._delayed(reply, incoming)

    def post(self, outgoing: torch.Tensor | None) -> None:
        """See `Exchange`."""
        self._link.post(self._stamped(outgoing))

    def collect(self, incoming: int) -> torch.Tensor:
        """See `Exchange`."""
        return self._delayed(self._link.collect(_with_stamp(incoming)), incoming)

    def _stamped(self, outgoing: torch.Tensor | None) -> torch.Tensor | None:
        """A message with its send time, which is not counted."""
        if outgoing is None or not outgoing.numel():
            return None
        stamp = torch.frombuffer(bytearray(_STAMP.pack(time.monotonic())), dtype=torch.uint8)
        self.traffic.sent -= _STAMP.size
        return torch.cat([stamp, outgoing])

    def _delayed(self, reply: torch.Tensor, incoming: int) -> torch.Tensor:
        """A message without its send time, once it would have arrived."""
        if not incoming:
            return reply
        self.traffic.received -= _STAMP.size
        (sent,) = _STAMP.unpack(reply[: _STAMP.size].numpy().tobytes())
        self._incoming.wait(sent, incoming)
        return reply[_STAMP.size :]


def _with_stamp(incoming: int) -> int:
    return incoming + _STAMP.size if incoming else 0


class EmulatedBlocks:
    """Delivers a dealer's blocks when the link would: after their transfer, and the latency.

    A block counts as sent when it arrives here, which a thread of its own notes.
    """

    def __init__(self, blocks: BlockReader, emulated: Link) -> None:
        self._blocks = blocks
        self._incoming = _Line(emulated)
        self._arrived: Queue[tuple[float, torch.Tensor | PartyError | None]] = Queue(_BLOCKS)
        threading.Thread(target=self._take, name="emulated-stream", daemon=True).start()

    def get(self) -> torch.Tensor | None:
        """The next block; None after the last."""
        sent, block = self._arrived.get()
        if isinstance(block, PartyError):
            raise block
        if block is not None:
            self._incoming.wait(sent, block.numel())
        return block

    def _take(self) -> None:
        block: torch.Tensor | PartyError | None = _NOTHING
        while isinstance(block, torch.Tensor):
            try:
                block = self._blocks.get()
            except PartyError as error:
                block = error
            self._arrived.put((time.monotonic(), block))

    def deadline(self, since: float, limit: float) -> float:
        """See `BlockReader`."""
        return self._blocks.deadline(since, limit)

    def silent(self, since: float, limit: float) -> PartyError:
        """See `BlockReader`."""
        return self._blocks.silent(since, limit)
