"""Public factors that keep values within the domains of CrypTen's stock approximations."""

from __future__ import annotations

import math

MASKED_OUT = 128.0
"""Subtracted from a masked score. CrypTen's exponential is 0 from -100 to -400, and diverges below
-512."""

_LARGEST = 64.0 * 2.0**4
"""CrypTen's inverse root is valid for 0.05 < x < 200; a norm's bound is 2**4 above the largest
value seen in calibration."""


def norm_factor(bound: float) -> float:
    """The factor to multiply a row by before its norm, whose result is scale invariant.

    bound: largest mean square that the row may have; 0 if none was measured.
    """
    return math.sqrt(_LARGEST / bound) if bound else 1.0
