"""Public numbers that keep values inside the domains of CrypTen's stock approximations."""

from __future__ import annotations

import math

MASKED_OUT = 128.0
"""Subtracted from a masked score: CrypTen's exponential is 0 from -100 to -400, and beyond -512
it explodes."""

_LARGEST = 64.0 * 2.0**4
"""CrypTen's inverse root holds for 0.05 < x < 200; a norm's bound is 2**4 above what was seen."""


def norm_factor(bound: float) -> float:
    """What to multiply a row by before its norm, whose result does not depend on it.

    bound: the largest mean square that the row may have, 0 where none was measured.
    """
    return math.sqrt(_LARGEST / bound) if bound else 1.0
