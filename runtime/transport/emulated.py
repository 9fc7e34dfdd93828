"""A link that is as slow as an emulated network: for measurements on one machine.

Sessions never use it unless asked to. Both ends must wrap their link, and run on one machine: the
transfer time of a message is measured from when it was sent, by the machine's monotonic clock.
"""

from __future__ import annotations

import struct
import time

import torch

from mergec.runtime.core.network import Network
from mergec.runtime.transport.traffic import Exchange, Traffic

_STAMP = struct.Struct("<d")


class EmulatedLink:
    """Delivers a message when the network would: after the transfer of its bytes, and the latency.

    Each message carries its send time, 8 bytes that are not counted as traffic. A message waits for
    the previous one in its direction, as both share the line; the two directions do not wait for
    each other. The profile's overhead is not added, because this machine has its own.
    """

    def __init__(self, link: Exchange, network: Network) -> None:
        self._link = link
        self._network = network
        self._line_free = 0.0

    @property
    def traffic(self) -> Traffic:
        return self._link.traffic

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor:
        """Like the wrapped link's, but delayed."""
        sends = outgoing is not None and outgoing.numel() > 0
        if outgoing is not None and sends:
            stamp = torch.frombuffer(bytearray(_STAMP.pack(time.monotonic())), dtype=torch.uint8)
            outgoing = torch.cat([stamp, outgoing])
        reply = self._link.exchange(outgoing, incoming + _STAMP.size if incoming else 0)
        self.traffic.sent -= _STAMP.size if sends else 0
        if not incoming:
            return reply
        self.traffic.received -= _STAMP.size
        (sent,) = _STAMP.unpack(reply[: _STAMP.size].numpy().tobytes())
        self._line_free = max(self._line_free, sent) + incoming / self._network.bandwidth
        time.sleep(max(0.0, self._line_free + self._network.latency - time.monotonic()))
        return reply[_STAMP.size :]
