"""Counters of the data that crosses a transport, as seen by one party."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch


@dataclass
class Traffic:
    """Payload bytes that this party sent and received, and rounds.

    What one party sends the other receives, so `sent + received` at either party equals the online
    bytes of `core.spec.Cost`. Traffic from or to the dealer is offline and takes no rounds.
    """

    rounds: int = 0
    sent: int = 0
    received: int = 0
    offline_sent: int = 0
    offline_received: int = 0

    @property
    def online(self) -> int:
        """Bytes between the client and the server, in both directions."""
        return self.sent + self.received

    @property
    def offline(self) -> int:
        """Bytes between the dealer and this party."""
        return self.offline_sent + self.offline_received

    def __sub__(self, earlier: Traffic) -> Traffic:
        """The traffic since an earlier snapshot."""
        return Traffic(
            self.rounds - earlier.rounds,
            self.sent - earlier.sent,
            self.received - earlier.received,
            self.offline_sent - earlier.offline_sent,
            self.offline_received - earlier.offline_received,
        )

    def snapshot(self) -> Traffic:
        """A copy that no longer changes."""
        return replace(self)

    def reset(self) -> None:
        """Set all counters to zero."""
        self.rounds = self.sent = self.received = 0
        self.offline_sent = self.offline_received = 0


class Exchange(Protocol):
    """The interface of a link between the two parties, over any transport. One call is one round.

    `outgoing` is 1-D uint8 on the CPU, or None; the result has `incoming` bytes. `post` and
    `collect` are its two halves, for a thread each.
    """

    @property
    def traffic(self) -> Traffic: ...

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor: ...

    def post(self, outgoing: torch.Tensor | None) -> None: ...

    def collect(self, incoming: int) -> torch.Tensor: ...
