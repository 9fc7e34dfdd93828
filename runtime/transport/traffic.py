"""Counters of what crosses a transport, as one party sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch


@dataclass
class Traffic:
    """Payload bytes that this party sent and received, and the rounds that took.

    Between the two parties what one sends the other receives, so `sent + received` at either of
    them is the bytes of `core.spec.Cost`. What comes from or goes to the dealer is offline, and
    takes no rounds.
    """

    rounds: int = 0
    sent: int = 0
    received: int = 0
    offline_sent: int = 0
    offline_received: int = 0

    @property
    def online(self) -> int:
        """Bytes between the client and the server, both directions."""
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
        """A copy that does not change any more."""
        return replace(self)

    def reset(self) -> None:
        """Set all counters to zero."""
        self.rounds = self.sent = self.received = 0
        self.offline_sent = self.offline_received = 0


class Exchange(Protocol):
    """What a link between the two parties offers, over whatever transport: one call is one round.

    `outgoing` is 1-D uint8 on the CPU, or None; the result has `incoming` bytes.
    """

    @property
    def traffic(self) -> Traffic: ...

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor: ...
