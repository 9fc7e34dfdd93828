"""Words of 128 bits as two of 64, the lower one first, by torch alone."""

from __future__ import annotations

import torch

_HALF_BITS = 32
_HALF = (1 << _HALF_BITS) - 1
_LEAST = -(1 << 63)

Double = tuple[torch.Tensor, torch.Tensor]


def less(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """1 where one is below other as unsigned words of 64 bits."""
    return ((one ^ _LEAST) < (other ^ _LEAST)).long()


def plus(one: Double, other: Double) -> Double:
    """The sum."""
    low = one[0] + other[0]
    return low, one[1] + other[1] + less(low, one[0])


def minus(one: Double, other: Double) -> Double:
    """The difference."""
    return one[0] - other[0], one[1] - other[1] - less(one[0], other[0])


def times(one: Double, factor: torch.Tensor) -> Double:
    """Times signed words of 64 bits."""
    low, high = one
    upper, lower = _upper(low), low & _HALF
    above, below = _upper(factor), factor & _HALF
    middle = upper * below + _upper(lower * below)
    other = lower * above + (middle & _HALF)
    carried = upper * above + _upper(middle) + _upper(other)
    # As an unsigned word a negative factor is 2**64 too large.
    return low * factor, high * factor + carried - low * (factor < 0)


def _upper(word: torch.Tensor) -> torch.Tensor:
    return (word >> _HALF_BITS) & _HALF
