"""Reciprocals and inverse square roots of positive shares over many octaves.

V in [2**j, 2**(j+1)) is brought to [2**53, 2**54) by a secret power of two, looked up there in one
table of cubics, and scaled back by a secret constant. Both factors are public combinations of the
comparison bits [V < 2**j], which all come from one or two openings of 32-bit windows of V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from runtime.context import Context
from runtime.messages import Protocol, together
from runtime.protocols.compare import (
    less_than,
    less_than_cost,
    open_window,
    open_window_cost,
    take_window,
)
from runtime.protocols.interval import Table, evaluate, evaluate_cost, fit
from runtime.protocols.multiply import multiply, multiply_cost
from runtime.protocols.opening import open_under
from runtime.protocols.truncate import truncate, truncate_cost
from runtime.spec import HEADROOM_BITS, Cost

MAX_EXPONENT = 53
"""V must be below 2**54."""

_NORMAL_BITS = 53
_HIGH_DROP = 24
_SPLIT = 28
"""With two windows, octaves below this are found in the low one, the others 24 bits up."""

_LOW_ONLY = 29
"""Up to this octave the low window does alone: it holds V < 2**30 with room for its sign."""

_TABLE_FRAC = 60
_MANTISSA_FRAC = 24
_GAIN_BITS = 18
"""Bits that the gain of the largest V keeps at most, so that its value is good to 2**-18."""

_GAIN_ROOM = HEADROOM_BITS - _MANTISSA_FRAC - 1
"""Bits that the gain of the smallest V may take."""


def _table(exponent: float) -> Table:
    # Starts at 3/4: the high window is up to 1/16 off at its lowest octave.
    return fit(
        lambda w: np.maximum(w, 0.5) ** exponent,
        unit_bits=_NORMAL_BITS,
        start=24 << 48,
        windows=64,
        step_bits=48,
        out_frac=_TABLE_FRAC,
        drop=34,
    )


_TABLES = {-0.5: _table(-0.5), -1.0: _table(-1.0)}


@dataclass(frozen=True)
class Power:
    """(V * 2**-v_frac)**exponent for V in [2**low, 2**(high + 1)), exponent -1/2 or -1.

    v_frac may be any real number, so that constant factors of V are free of charge.
    out_frac is chosen so that the smallest result keeps 18 significant bits, or fewer where more
    than 19 octaves of the result have to fit besides.
    """

    exponent: float
    v_frac: float
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= MAX_EXPONENT:
            raise ValueError(f"octaves {self.low} to {self.high} are outside 0 to {MAX_EXPONENT}")
        if self._gain_bits < 8:
            raise ValueError(f"octaves {self.low} to {self.high} span too much for one scale")

    @property
    def _gain_bits(self) -> int:
        span = math.ceil(-self.exponent * (self.high - self.low))
        return min(_GAIN_BITS, _GAIN_ROOM - span)

    @property
    def out_frac(self) -> int:
        """Fractional bits of the result."""
        return max(0, math.ceil(self._gain_bits - self.exponent * (self.high - self.v_frac)))

    @property
    def thresholds(self) -> tuple[list[int], list[int]]:
        """Exponents j of the comparisons with 2**j, in the low and in the high window."""
        octaves = range(self.low + 1, self.high + 1)
        if self.high <= _LOW_ONLY:
            return list(octaves), []
        return [j for j in octaves if j < _SPLIT], [j for j in octaves if j >= _SPLIT]

    def gain(self, octave: int) -> int:
        """What the mantissa of an octave is multiplied by."""
        return round(2.0 ** (self.exponent * (octave - self.v_frac) + self.out_frac))


def power(ctx: Context, share: torch.Tensor, spec: Power) -> Protocol:
    """Shares of (V * 2**-v_frac)**exponent with `spec.out_frac` fractional bits.

    In: additive share of the integer V, 0 < V < 2**54; octaves beyond `spec` give a wrong finite
    value. Relative error 2**-15 where the gain keeps its 18 bits. Rounds 7, or 8 where both windows
    are needed. What each party sees: openings of windows, comparison bits, Beaver factors and
    truncations, each under a fresh mask.
    """
    shape = share.shape
    flat = share.reshape(-1)
    low, high = spec.thresholds
    windows = yield from together(
        *(open_window(ctx, take_window(flat, drop)) for drop, _ in _used(low, high))
    )
    flags = yield from together(
        *(
            less_than(ctx, window, [1 << (j - drop) for j in found])
            for window, (drop, found) in zip(windows, _used(low, high), strict=True)
        )
    )
    normal, gain = _scales(ctx, spec, low, high, flags)
    if low and high:
        # Below 2**28 the high window knows nothing; above, the low one is out of its range.
        small = flags[1][0]
        step = [] if small.is_meta else [normal[0] - normal[1], gain[0] - gain[1]]
        picked = yield from multiply(ctx, *((small, d) for d in step or [small, small]))
        if not small.is_meta:
            normal = [normal[1] + picked[0]]
            gain = [gain[1] + picked[1]]
    (scaled,) = yield from multiply(ctx, (flat, normal[0]))
    mask = ctx.mask(scaled.shape)
    opened = yield from open_under(ctx, scaled, mask)
    table = _TABLES[spec.exponent]
    mantissa = evaluate(ctx, opened, mask, table)
    mantissa = yield from truncate(ctx, mantissa, table.out_frac - _MANTISSA_FRAC)
    (product,) = yield from multiply(ctx, (mantissa, gain[0]))
    result = yield from truncate(ctx, product, _MANTISSA_FRAC)
    return result.reshape(shape)


def power_cost(spec: Power, count: int) -> Cost:
    """Cost of `power` for `count` elements."""
    low, high = spec.thresholds
    opening, flags = Cost(), Cost()
    for _, found in _used(low, high):
        opening = opening.beside(open_window_cost(count))
        flags = flags.beside(less_than_cost(count, len(found)))
    triple = (count, count, count)
    pick = multiply_cost(triple, triple) if low and high else Cost()
    table = _TABLES[spec.exponent]
    return (
        opening
        + flags
        + pick
        + multiply_cost(triple)
        + Cost(rounds=1, online=16 * count)
        + evaluate_cost(count, table)
        + truncate_cost(count, table.out_frac - _MANTISSA_FRAC)
        + multiply_cost(triple)
        + truncate_cost(count, _MANTISSA_FRAC)
    )


def _used(low: list[int], high: list[int]) -> list[tuple[int, list[int]]]:
    """The windows that are needed: how many low bits each leaves out, and its thresholds."""
    return [(drop, found) for drop, found in ((0, low), (_HIGH_DROP, high)) if found]


def _scales(
    ctx: Context, spec: Power, low: list[int], high: list[int], flags: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per window, shares of the power of two that normalizes V and of the gain that undoes it."""
    normals, gains = [], []
    for flag, (drop, found) in zip(flags, _used(low, high), strict=True):
        if flag.is_meta:
            ghost = torch.empty(flag.shape[1:], dtype=torch.int64, device="meta")
            normals.append(ghost)
            gains.append(ghost)
            continue
        # A value at least 2**j for the found thresholds up to j is in octave j.
        first = spec.low if drop == 0 or not low else found[0] - 1
        octaves = [first, *found]
        for collect, weight in ((normals, _normalizer), (gains, spec.gain)):
            weights = [weight(octave) for octave in octaves]
            total = ctx.public(torch.full_like(flag[0], weights[-1]))
            for index in range(len(found)):
                total = total + flag[index] * (weights[index] - weights[index + 1])
            collect.append(total)
    return normals, gains


def _normalizer(octave: int) -> int:
    return 1 << (_NORMAL_BITS - octave)
