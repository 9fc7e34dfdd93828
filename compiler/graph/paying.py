"""Up to how many rows a way pays that saves rounds for bytes of each row."""

from __future__ import annotations

import math
from collections.abc import Callable

MOST = 1024
"""The largest limit of rows that a program states."""


def rows_that_pay(weigh: Callable[[int, int], float]) -> tuple[int, float]:
    """Up to how many rows the way is cheaper; if for none, 0 and by how many seconds it is not.

    weigh: seconds of a call on a number of rows, which takes the way up to another number of them.
    Both costs are affine in the number of rows.
    """

    def gain(count: int) -> float:
        return weigh(count, 0) - weigh(count, count)

    once, each = gain(1), gain(1) - gain(2)
    if once <= 0:
        return 0, -once
    return (MOST if each <= 0 else min(MOST, math.ceil(once / each))), 0.0
