"""How many tokens a client may use per minute."""

from __future__ import annotations

import time

DEFAULT_RATE = 600
"""Tokens per client and minute that `mergec serve` allows unless it is told otherwise: about twice
what a person reads. A client has 864,000 a day, so this slows an attack by many queries down and
does not prevent it (docs/rounding.md)."""


class Allowance:
    """A token bucket that refills within a minute. An answer that has begun may overdraw it."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._left = float(rate)
        self._when = time.monotonic()

    def spend(self, tokens: int) -> None:
        self._refill()
        self._left -= tokens

    def wait(self) -> float:
        """Seconds until the next answer may begin; 0 if it may begin now."""
        self._refill()
        return 0.0 if not self._rate or self._left >= 1 else (1 - self._left) * 60 / self._rate

    def _refill(self) -> None:
        now = time.monotonic()
        self._left = min(self._rate, self._left + (now - self._when) * self._rate / 60)
        self._when = now
