"""Visibility, cost and ring constants. Imports nothing from the rest of the package."""

from __future__ import annotations

import enum
from dataclasses import dataclass

RING_BITS = 64
"""Secret shares are integers modulo 2**64."""

FRACTIONAL_BITS = 16
"""Fractional bits of an activation after truncation, and of an encoded weight."""

HEADROOM_BITS = 62
"""A shared value x must satisfy |x| < 2**62: faithful truncation needs one spare bit."""

WINDOW_FRAC = 48
"""Most fractional bits of an operand of which a protocol takes a 32-bit window: it keeps 16 bits
behind the point, so that at most 32 bits are dropped and all 32 bits above are right."""

SHARE_FRAC = HEADROOM_BITS
"""Most fractional bits of any shared value: with more, nothing as large as 1 would fit."""

RANGE_MARGIN_BITS = 3
"""A value may become 2**3 times as large as in calibration before it leaves the ring."""

MAX_NOISE = 2.0**-4
"""Largest standard deviation of the server's noise in a logit. The largest number that is drawn is
then below 1, which fits beside any value that a share can hold."""

MAX_DRAFTS = 31
"""Most drafted tokens that a step can check. Longer runs of right drafts are too rare to pay."""

MAX_HEADS = 8
"""Most heads of a model that guess the tokens after the next one. Heads that look further ahead are
too rarely right to pay."""

CLIENT, SERVER, DEALER = 0, 1, 2
"""Party numbers. The client owns the prompt, the server owns the weights, the dealer neither."""

ROLES = ("client", "server", "dealer")

CHOICES = {
    "weights": ("server", "shared"),
    "reveal": ("logits", "token"),
    "network": ("loopback", "lan", "wan", "wan3"),
    "rounding": ("public", "exact"),
}
"""Options of a compile and their allowed values, under their names in the manifest.

weights: who knows the weights while the program runs. reveal: what the client learns from a step.
network: the network that protocols were chosen for (`runtime.core.network`). rounding: whether the
client sees bits that decide how intermediate values are rounded (`protocols.opening`).
"""


class Vis(enum.Enum):
    """Who knows a value in the clear. `SHARED` means nobody: each party holds a secret share."""

    PUBLIC = "public"
    CLIENT = "client"
    SERVER = "server"
    SHARED = "shared"

    def join(self, other: Vis) -> Vis:
        """Least upper bound in the lattice public < client, server < shared."""
        if self is other or other is Vis.PUBLIC:
            return self
        if self is Vis.PUBLIC:
            return other
        return Vis.SHARED


@dataclass(frozen=True)
class Cost:
    """Communication of one op. Bytes are summed over both directions.

    rounds: number of messages that must follow one another; both directions at once count as one.
    online: bytes between client and server while the step runs.
    offline: bytes from the dealer (corrections to correlated randomness; seeds are free).
    """

    rounds: int = 0
    online: int = 0
    offline: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Cost of one protocol after another."""
        return Cost(
            self.rounds + other.rounds, self.online + other.online, self.offline + other.offline
        )

    def beside(self, other: Cost) -> Cost:
        """Cost of two protocols run in lockstep: they share rounds."""
        return Cost(
            max(self.rounds, other.rounds), self.online + other.online, self.offline + other.offline
        )
