"""Functions of positive shares over many octaves: reciprocals, inverse roots, logarithms.

V is opened once, as z = V + r. For every octave k (or pair of octaves) that V may lie in, a table
of cubics yields a mantissa m_k from that opening without a message; m_k is right if V lies there.
Which octave V lies in follows from comparisons with powers of two. These need not be exact, because
neighbouring tables overlap: with t the exponent, D = (z >> t) - (r >> t) is V >> t or one more, and
[D is 0 or 1] is

    true for V < 2**t,    false for V >= 2**(t + 1).

D = 0 and D = 1 mean that z >> t or (z >> t) - 1 equals r >> t. This is tested digit by digit in
shared tables of equality. The resulting bits are opened under masks, and in the same round so are
the mantissas. Then h_k = [V in k] m_k is a public linear combination of dealt words, and a power is
the sum of h_k 2**-k. Two rounds in all. Sources: equality of digits in one-time truth tables (Ishai
et al., TCC 2013), piecewise polynomials on an opening (`interval`). Evaluating the octaves in
parallel is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import CLIENT, DEALER, Cost
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.compare import WINDOW_BITS
from mergec.runtime.protocols.formula import Formula, added, conjunction, open_bits
from mergec.runtime.protocols.interval import (
    FINER_BITS,
    Table,
    evaluate,
    evaluate_cost,
    fit,
    fit_finely,
)
from mergec.runtime.protocols.local import ghost
from mergec.runtime.protocols.opening import open_high
from mergec.runtime.protocols.saturate import table_value
from mergec.runtime.protocols.truncate import NARROW_OFFSET, base_of, truncation_words, wrap_of

MAX_EXPONENT = 53
"""V must be below 2**54."""

_DIGITS = 4
"""Digits that V >> t is cut into; looking up two points yields a byte of bits."""

_STEP_BITS = 14
_LEAST = 4
"""Each level's table has 2**4 windows from its power of two to the next; V is shifted up so that
its lowest octave begins at 2**4 or above."""

_TABLE_FRAC = 60
_NARROW_FRAC = _TABLE_FRAC - WINDOW_BITS
_ROOM = 61
"""Bits available for the largest result."""

_SHARED = 5
"""Payloads of a comparison: one, and two words of each of the two mantissas it chooses between."""

_ZERO_OR_ONE = Formula(added(conjunction(range(_DIGITS)), conjunction(range(_DIGITS, 2 * _DIGITS))))


@dataclass(frozen=True)
class Octaves:
    """Adjacent tables, each for `step` octaves of V in [2**low, 2**(high + 1)) plus one of overlap.

    mantissa_bits: fractional bits of a table's value, at most 28. tables: from `level_tables`.
    """

    low: int
    high: int
    mantissa_bits: int
    step: int
    tables: tuple[Table, Table]

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= MAX_EXPONENT:
            raise ValueError(f"octaves {self.low} to {self.high} are outside 0 to {MAX_EXPONENT}")

    @cached_property
    def levels(self) -> int:
        """Number of tables; the last one extends one octave beyond `high`."""
        return (self.high - self.low) // self.step + 1

    @cached_property
    def lift(self) -> int:
        """Number of bits by which V is shifted up."""
        return max(0, _LEAST - self.low)

    def bottom(self, level: int) -> int:
        """Exponent of the power of two at which a level begins, after `lift`."""
        return self.low + self.lift + self.step * level

    @cached_property
    def drops(self) -> np.ndarray:
        """Per level, the bits by which V is shifted down to the units of its table."""
        return np.array([self.bottom(k) - _STEP_BITS - _LEAST for k in range(self.levels)])

    @cached_property
    def layout(self) -> tuple[np.ndarray, int]:
        """Digits of each level but the first (shift, ones, first byte), and the total bytes."""
        places = np.zeros((self.levels - 1, _DIGITS, 3), np.int64)
        first = 0
        for level in range(1, self.levels):
            bottom = self.bottom(level)
            # D is below 2**(high + 1 - bottom); one more bit distinguishes it from a negative
            # value.
            width = self.high + 2 + self.lift - bottom
            cuts = [bottom + width * i // _DIGITS for i in range(_DIGITS + 1)]
            for digit in range(_DIGITS):
                ones = 2 ** (cuts[digit + 1] - cuts[digit]) - 1
                places[level - 1, digit] = cuts[digit], ones, first
                first += (ones >> 3) + 1
        return places, first


def level_tables(function: Callable[[np.ndarray], np.ndarray], step: int) -> tuple[Table, Table]:
    """Tables of f(w) for w in [1, 2**(step + 1)), unit 2**-18; |f| below 4.

    The first has 16 windows per 1.0. The second, for exact rounding, has 64 (`Function.fine`).
    """

    def table(finer: int) -> Table:
        return (fit_finely if finer else fit)(
            lambda w: function(np.maximum(w, 0.9)),
            unit_bits=_STEP_BITS + _LEAST,
            start=0,
            windows=2 ** (_LEAST + 1 + step + finer),
            step_bits=_STEP_BITS - finer,
            out_frac=_TABLE_FRAC,
        )

    return table(0), table(FINER_BITS)


@cache
def _power_tables(exponent: float, factor: float) -> tuple[Table, Table]:
    return level_tables(lambda w: factor * w**exponent, round(-1 / exponent))


@dataclass(frozen=True)
class Power:
    """(V * 2**-v_frac)**exponent for V in [2**low, 2**(high + 1)), with exponent -1/2 or -1.

    v_frac may be any real number, so constant factors of V cost nothing. mantissa_bits: fractional
    bits of the result's mantissa, which is in (1/4, 2).
    """

    exponent: float
    v_frac: float
    low: int
    high: int
    mantissa_bits: int = 24

    def __post_init__(self) -> None:
        if self.mantissa_bits + self.octaves.levels > _ROOM:
            raise ValueError(f"octaves {self.low} to {self.high} span too much for one scale")

    @cached_property
    def octaves(self) -> Octaves:
        """The mantissa tables; the result's exponent decreases by one from level to level."""
        surplus = self.exponent * (self.low - self.v_frac) - self.first_exponent
        step = round(-1 / self.exponent)
        tables = _power_tables(self.exponent, 2.0**surplus)
        return Octaves(self.low, self.high, self.mantissa_bits, step, tables)

    @cached_property
    def first_exponent(self) -> int:
        """The result in level k is 2**(first_exponent - k) times its mantissa."""
        return math.floor(self.exponent * (self.low - self.v_frac))

    @cached_property
    def out_frac(self) -> int:
        """Fractional bits of the result of `power`."""
        return max(0, self.mantissa_bits - self.first_exponent + self.octaves.levels - 1)


def find_octave(ctx: Context, share: torch.Tensor, spec: Octaves) -> Protocol:
    """Shares of f(V) in the level of V and zero in all other levels: [n, levels]; and the level.

    In: additive share [n] of the integer V in [2**low, 2**(high + 1)). Other values return a wrong
    result, but one no larger than a table entry. Out: shares modulo 2**64 of f(V * 2**-bottom) with
    `mantissa_bits` fractional bits, with the error of the cubics (2**-18 relative for powers) plus
    one unit; and shares of [V is below level k] for all k but the first, [n, levels - 1].
    Rounds 2, online 16 bytes per element, plus 8 for each level and 2 for each but the first. Each
    party sees V, the mantissas and the equality bits, each under fresh, uniform masks.

    With exact rounding V is opened once for each level, under a mask of its own, as each level
    rounds off other bits (`open_high`): rounds 4.
    """
    count, levels = len(share), spec.levels
    mask = ctx.mask((count, levels if ctx.exact else 1))
    places, size = spec.layout
    if levels > 1:
        tables = ctx.deal_bits((count, size), lambda: _one_hot(mask, places, size))
    lifted = share << spec.lift if spec.lift and not share.is_meta else share
    lifted = lifted[:, None].expand(mask.shape)
    drops = spec.drops.tolist() if ctx.exact else 0
    opened = yield from open_high(ctx, lifted, mask, drops)
    # `_positions` of the mask is needed only at the dealer.
    masks = _positions(mask, spec) if ctx.party == DEALER else mask
    shift = _NARROW_FRAC - spec.mantissa_bits
    found = evaluate(ctx, _positions(opened, spec), masks, spec.tables[ctx.exact])
    value = table_value(ctx, found, shift)
    wide_mask = value.mask(ctx)
    value_mask = value.narrow(wide_mask).reshape(count, levels)
    mantissa = value.open(ctx, wide_mask, NARROW_OFFSET)
    last = ctx.deal((2, count), lambda: truncation_words(value_mask[:, -1], shift))
    if levels > 1:
        bit_mask = ctx.mask_bits((count, levels - 1))
        words = _ZERO_OR_ONE.deal(ctx, bit_mask, lambda: _payload(value_mask, shift), _SHARED)
        equal = open_bits(ctx, _equalities(opened, tables, places), bit_mask)
        opened_value, bits = yield from together(mantissa, equal)
    else:
        opened_value = yield from mantissa
    if share.is_meta:
        return ghost((count, levels)), ghost((count, levels - 1))
    found = torch.empty((count, 0, _SHARED), dtype=torch.int64, device=share.device)
    if levels > 1:
        found = _ZERO_OR_ONE.evaluate(bits, words)
    result = np.empty((count, levels), np.int64)
    _choose_cpu(
        opened_value.reshape(count, levels).cpu().numpy(),
        *(word.cpu().numpy() for word in (found, last)), shift, ctx.party == CLIENT, result,
    )  # fmt: skip
    return torch.from_numpy(result).to(share.device), found[..., 0]


def find_octave_cost(spec: Octaves, count: int) -> Cost:
    """Cost of `find_octave` for `count` elements."""
    levels, size = spec.levels, spec.layout[1]
    words = 2 + (levels - 1) * _SHARED * _ZERO_OR_ONE.words
    return evaluate_cost(count * levels, spec.tables[0]) + Cost(
        rounds=2,
        online=(16 + 8 * levels + 2 * (levels - 1)) * count,
        offline=(size + 8 * words) * count,
    )


def octaves(ctx: Context, share: torch.Tensor, spec: Power) -> Protocol:
    """Shares of the result's mantissa in the level of V and zero in all others: [n, levels].

    (V * 2**-v_frac)**exponent is the sum over k of 2**(first_exponent - k) times column k. Rounds,
    bytes, range, error and what each party sees: see `find_octave`.
    """
    found, _ = yield from find_octave(ctx, share, spec.octaves)
    return found


def octaves_cost(spec: Power, count: int) -> Cost:
    """Cost of `octaves` for `count` elements."""
    return find_octave_cost(spec.octaves, count)


def power(ctx: Context, share: torch.Tensor, spec: Power) -> Protocol:
    """Shares of (V * 2**-v_frac)**exponent with `spec.out_frac` fractional bits.

    In: additive share of the integer V in [2**low, 2**(high + 1)), any shape. Other values return a
    wrong result, but one no larger than the largest valid result. Relative error 2**-17 with
    mantissas of 20 bits or more. Rounds 2. Bytes and what each party sees: see `find_octave`.
    """
    found = yield from octaves(ctx, share.reshape(-1), spec)
    if not found.is_meta:
        scale = spec.out_frac - spec.mantissa_bits + spec.first_exponent
        shifts = torch.tensor([scale - k for k in range(found.shape[1])], device=found.device)
        found = found << shifts
    return found.sum(-1).reshape(share.shape)


def power_cost(spec: Power, count: int) -> Cost:
    """Cost of `power` for `count` elements."""
    return octaves_cost(spec, count)


def _positions(words: torch.Tensor, spec: Octaves) -> torch.Tensor:
    """V (or its mask) in the units of every level's table, flattened to [n * levels].

    words: [n, 1] for all levels, or [n, levels].
    """
    if words.is_meta:
        return torch.empty(len(words) * spec.levels, dtype=torch.int64, device="meta")
    out = np.empty((len(words), spec.levels), np.int64)
    _positions_cpu(words.cpu().numpy(), spec.drops, out)
    return torch.from_numpy(out.reshape(-1)).to(words.device)


def _payload(value_mask: torch.Tensor, shift: int) -> torch.Tensor:
    """One, the words of the mantissa that a comparison excludes, and those of the one it admits."""
    low, top = truncation_words(value_mask, shift).numpy()
    out = np.ones((len(low), low.shape[1] - 1, _SHARED), np.int64)
    out[..., 1], out[..., 2] = low[:, 1:], top[:, 1:]
    out[..., 3], out[..., 4] = low[:, :-1], top[:, :-1]
    return torch.from_numpy(out)


def _one_hot(mask: torch.Tensor, places: np.ndarray, size: int) -> torch.Tensor:
    """Packed bits [v = digit of r] per digit and level, [n, size]. Called by the dealer."""
    out = np.zeros((len(mask), size), np.uint8)
    _one_hot_cpu(mask.cpu().numpy(), places, out)
    return torch.from_numpy(out).to(mask.device)


def _equalities(opened: torch.Tensor, tables: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    """Digit equalities of D and r, bytes [n, levels - 1]: four bits for D = 0, four for D = 1."""
    shape = (len(opened), len(places))
    if opened.is_meta:
        return torch.empty(shape, dtype=torch.uint8, device="meta")
    out = np.zeros(shape, np.uint8)
    _equalities_cpu(opened.cpu().numpy(), tables.cpu().numpy(), places, out)
    return torch.from_numpy(out).to(opened.device)


@compiled()
def _positions_cpu(words, drops, out):  # type: ignore[no-untyped-def]
    for i in range(words.shape[0]):
        for k in range(drops.shape[0]):
            word, drop = np.uint64(words[i, min(k, words.shape[1] - 1)]), drops[k]
            moved = word >> np.uint64(drop) if drop >= 0 else word << np.uint64(-drop)
            out[i, k] = np.int64(moved)


@compiled()
def _choose_cpu(value, found, last, shift, at_client, out):  # type: ignore[no-untyped-def]
    levels = value.shape[1]
    for i in range(value.shape[0]):
        z = value[i, levels - 1]
        base = base_of(z, shift, WINDOW_BITS) if at_client else np.int64(0)
        out[i, levels - 1] = base - last[0, i] + wrap_of(z, shift, WINDOW_BITS) * last[1, i]
        # If V is below level k, it is not in k or above, but it may be in k - 1.
        for k in range(levels - 1, 0, -1):
            below, low, top, low_before, top_before = found[i, k - 1]
            base, wrap = base_of(z, shift, WINDOW_BITS), wrap_of(z, shift, WINDOW_BITS)
            out[i, k] -= base * below - low + wrap * top
            z = value[i, k - 1]
            base, wrap = base_of(z, shift, WINDOW_BITS), wrap_of(z, shift, WINDOW_BITS)
            out[i, k - 1] = base * below - low_before + wrap * top_before


@compiled()
def _one_hot_cpu(mask, places, out):  # type: ignore[no-untyped-def]
    for i in range(mask.shape[0]):
        for k in range(places.shape[0]):
            for d in range(places.shape[1]):
                v = (mask[i, min(k + 1, mask.shape[1] - 1)] >> places[k, d, 0]) & places[k, d, 1]
                out[i, places[k, d, 2] + (v >> 3)] |= np.uint8(1 << (v & 7))


@compiled()
def _equalities_cpu(opened, tables, places, out):  # type: ignore[no-untyped-def]
    digits = places.shape[1]
    for i in range(opened.shape[0]):
        for k in range(places.shape[0]):
            bottom = places[k, 0, 0]
            byte = 0
            for one in range(2):
                word = opened[i, min(k + 1, opened.shape[1] - 1)]
                point = word - (np.int64(one) << bottom)
                for d in range(digits):
                    v = (point >> places[k, d, 0]) & places[k, d, 1]
                    bit = (tables[i, places[k, d, 2] + (v >> 3)] >> (v & 7)) & 1
                    byte |= bit << (digits * one + d)
            out[i, k] = byte
