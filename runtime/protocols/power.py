"""Powers of positive shares: reciprocals and inverse roots over many octaves.

A power of V is the sum of the columns that `octave.columns` returns, each times a power of two. One
of them is the mantissa and the others are zero, so each column may be truncated, scaled or
multiplied by itself, and the sum is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import HEADROOM_BITS, Cost
from mergec.runtime.core.values import Wide
from mergec.runtime.protocols.octave import Octaves, columns, columns_cost
from mergec.runtime.protocols.truncate import truncate, truncate_cost
from mergec.runtime.protocols.wide import narrow_of_zeros

TABLE_FRAC = 60
"""Fractional bits of a mantissa, which is below 9/4."""

COLUMN_BITS = 2
"""The result becomes 2**2 times as small from one column to the next."""


@dataclass(frozen=True)
class Mantissa:
    """factor * v**exponent, with a factor from 1 to 2."""

    exponent: float
    factor: float

    def __call__(self, v: np.ndarray) -> np.ndarray:
        return np.asarray(self.factor * v**self.exponent)


@dataclass(frozen=True)
class Power:
    """(V * 2**-v_frac)**exponent for V in [2**low, 2**(high + 1)), with exponent -1/2 or -1.

    v_frac may be any real number, so constant factors of V cost nothing.
    """

    exponent: float
    v_frac: float
    low: int
    high: int

    def __post_init__(self) -> None:
        _ = self.octaves

    @cached_property
    def octaves(self) -> Octaves:
        """The mantissas, which are in (1/4, 9/4)."""
        surplus = self.exponent * (self.low - self.v_frac) - self.first_exponent
        span = round(-COLUMN_BITS / self.exponent)
        curve = Mantissa(self.exponent, 2.0**surplus)
        return Octaves(self.low, self.high, span, curve, TABLE_FRAC)

    @cached_property
    def first_exponent(self) -> int:
        """The result in column c is 2**(first_exponent - COLUMN_BITS * c) times its mantissa."""
        return math.floor(self.exponent * (self.low - self.v_frac))

    def shifts(self, frac: int) -> list[int]:
        """Per column, the bits that its mantissa is shifted down by for `frac` fractional bits.

        Columns whose result rounds to zero are left out.
        """
        first = TABLE_FRAC - frac - self.first_exponent
        shifts = [first + COLUMN_BITS * c for c in range(self.octaves.columns)]
        return [shift for shift in shifts if shift <= HEADROOM_BITS]


def octaves(ctx: Context, share: torch.Tensor, spec: Power) -> Protocol:
    """Shares of the result's mantissa in the column of V and zero in all others: [n, columns].

    (V * 2**-v_frac)**exponent is the sum over c of 2**(first_exponent - COLUMN_BITS * c) times
    column c, which has `TABLE_FRAC` fractional bits. Rounds, bytes, range, error and what each
    party sees: see `octave.columns`.
    """
    found = yield from columns(ctx, share, spec.octaves)
    return found


def octaves_cost(spec: Power, count: int) -> Cost:
    """Cost of `octaves` for `count` elements."""
    return columns_cost(spec.octaves, count)


def rounded_octaves(ctx: Context, share: torch.Tensor, spec: Power, frac: int) -> Protocol:
    """`octaves` with `frac` fractional bits, less than one unit off; zeros are exactly zero.

    The octaves' numbers have shares modulo 2**128, of which each party drops bits of its own: no
    round, and 64 bytes for each octave more than `octaves` takes offline. These roundings are fixed
    by bits of which each party knows its own, so this is not for exact rounding.
    """
    found = yield from columns(ctx, share, spec.octaves, wide=True)
    halves = Wide(found[..., 0], found[..., 1], TABLE_FRAC)
    return narrow_of_zeros(ctx, halves, TABLE_FRAC - frac)


def rounded_octaves_cost(spec: Power, count: int) -> Cost:
    """Cost of `rounded_octaves` for `count` elements."""
    return columns_cost(spec.octaves, count, wide=True)


def power(ctx: Context, share: torch.Tensor, spec: Power, frac: int) -> Protocol:
    """Shares of (V * 2**-v_frac)**exponent with `frac` fractional bits.

    In: additive share of the integer V in [2**low, 2**(high + 1)), any shape. Other values return a
    wrong result, but one no larger than the largest valid result. Error 2**-17 relative and one and
    a half units; with exact rounding up to two units. Rounds 2. Online 16 bytes per element, and
    those of truncating each column. What each party sees: see `octave.columns` and `truncate`.
    """
    found = yield from octaves(ctx, share.reshape(-1), spec)
    parts = yield from together(
        *(truncate(ctx, found[:, c], shift) for c, shift in enumerate(spec.shifts(frac)))
    )
    return torch.stack(parts).sum(0).reshape(share.shape)


def power_cost(spec: Power, frac: int, count: int) -> Cost:
    """Cost of `power` for `count` elements."""
    total = Cost()
    for shift in spec.shifts(frac):
        total = total.beside(truncate_cost(count, shift))
    return octaves_cost(spec, count) + total
