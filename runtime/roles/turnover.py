"""How long it takes until a place is free, from how long places were taken before."""

from __future__ import annotations

import math
import time
from collections import deque

_REMEMBERED = 32
_LONGEST = 3600


class Turnover:
    """The times for which a number of places were taken."""

    def __init__(self, places: int) -> None:
        self._places = max(places, 1)
        self._since: dict[object, float] = {}
        self._took: deque[float] = deque(maxlen=_REMEMBERED)

    def take(self, holder: object) -> None:
        """A place is taken."""
        self._since[holder] = time.monotonic()

    def leave(self, holder: object) -> None:
        """It is free again; does nothing if `holder` had none."""
        since = self._since.pop(holder, None)
        if since is not None:
            self._took.append(time.monotonic() - since)

    def wait(self, ahead: int) -> int:
        """Whole seconds, at least 1, until somebody with so many ahead may expect a place.

        The estimate is the mean time of the last places, or of those still taken if they take
        longer, for each turn of all places that has to pass.
        """
        now = time.monotonic()
        left, held = list(self._took), [now - since for since in self._since.values()]
        mean = max((sum(times) / len(times) for times in (left, held) if times), default=0.0)
        return max(1, min(_LONGEST, math.ceil(mean * (ahead + 1) / self._places)))
