"""Gumbel noise in fixed point: the argmax of scores plus noise is a draw from their softmax."""

from __future__ import annotations

import torch

from mergec.runtime.core.spec import FRACTIONAL_BITS
from mergec.runtime.core.values import encode, logical_shift

_UNIFORM_BITS = 52
"""Random bits of the uniform numbers; with one more, the largest number would round to 1."""


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel numbers -log(-log(u)) with 16 fractional bits, from uniform int64 words.

    u has 52 random bits and is the midpoint of its interval, so the noise is between -3.7 and 36.8.
    The values beyond have a probability of less than 2**-52. Results are rounded to nearest, so
    each is at most 2**-17 off.
    """
    uniform = (logical_shift(words, 64 - _UNIFORM_BITS).double() + 0.5) * 2.0**-_UNIFORM_BITS
    return encode(-torch.log(-torch.log(uniform)), FRACTIONAL_BITS)
