"""Scalar functions that are linear far from zero: a table in the middle, a line on either side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import FRACTIONAL_BITS, RANGE_MARGIN_BITS, Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import integers
from mergec.runtime.protocols.compare import WINDOW_BITS, take_window
from mergec.runtime.protocols.digits import Digits
from mergec.runtime.protocols.formula import Formula, Polynomial, added, negated, open_bits, shifted
from mergec.runtime.protocols.halves import Halves
from mergec.runtime.protocols.interval import (
    FINER_BITS,
    Table,
    evaluate,
    evaluate_cost,
    fit,
    fit_finely,
)
from mergec.runtime.protocols.opening import Cut, open_masked, open_masked_cost
from mergec.runtime.protocols.pieces import Pieces
from mergec.runtime.protocols.selection import Line, Selection
from mergec.runtime.protocols.truncate import NARROW_OFFSET, cut, truncate, truncate_cost

SCALAR_DOMAIN = (-(2.0**14), 2.0**14)
"""Valid inputs of these functions; beyond them the 32-bit window wraps to another number."""

_POSITION_BITS = 14

REACHES = range(6, 12)
"""For which n a function can be served for |x| < 2**n - 2**4 by `Function.from_server`."""

_ENDS = 2**4
"""No table reaches further from zero."""


@dataclass(frozen=True)
class Tail:
    """The function outside the table: slope * x + value, with an integer slope."""

    slope: int
    value: float

    def line(self, out_frac: int) -> Line:
        """The tail as a `Line`, from x with 16 fractional bits to `out_frac` of them."""
        scale = self.slope << (out_frac - FRACTIONAL_BITS)
        return Line(0, scale, round(self.value * 2**out_frac))


@dataclass(frozen=True, eq=False)
class Function:
    """A scalar function on inputs with 16 fractional bits.

    left, right: the tails outside the table; None if such inputs do not occur. The position where a
    tail begins is compared in units of 2**end_bits of x, so within the first unit of the table and
    its last two units, either the table or the tail may be used. Inputs outside the table but
    within `SCALAR_DOMAIN` use their tail. An input on the side of a missing tail, or beyond
    `SCALAR_DOMAIN`, returns the value of another input.

    served: the same function by a table that only the server is sent (`from_server`). reach: with
    n for it, the tails are compared for |x| < 2**n - 2**4 alone.

    fine: the same function for exact rounding. Which of two adjacent windows serves an input, and
    near an end whether the table or the tail does, depends on bits that the client sees. So does
    the small error of the result. On windows of a quarter of the size, and with ends twice as far
    apart, that error is far below a unit (`tests/protocols/test_rounding.py` states the bound).
    """

    table: Table | Pieces
    end_bits: int
    left: Tail | None
    right: Tail | None
    fine: Function | None = None
    served: Function | None = None
    reach: int = 0

    def from_server(self, reach: int) -> Function:
        """The same function with nothing dealt to the client, for |x| < 2**reach - 2**4.

        With a reach of 0, this function. Raises ValueError for a reach that is not in `REACHES`, or
        if the function has no such table.
        """
        if not reach:
            return self
        if self.served is None or reach not in REACHES:
            raise ValueError(f"the function has no table for inputs up to 2**{reach}")
        return _served(self.served, self.fine, reach)

    @cached_property
    def thresholds(self) -> list[int]:
        """Where the left and right tails meet the table, in those units from the table's start.

        In these units, a number is read as its value or one more; and the last window of the table
        serves the window before it.
        """
        end = self.table.span >> self.end_bits
        return [place for tail, place in ((self.left, 1), (self.right, end)) if tail]

    @cached_property
    def comparer(self) -> Digits | Halves:
        """The protocol that compares with the thresholds.

        `Halves` pays off if there are two. A single digit is one bit, too, and its table goes to
        the server alone, but it is short only if the inputs do not reach far.
        """
        width = WINDOW_BITS - self.end_bits
        if self.reach:
            return Digits(self.reach + 1 + FRACTIONAL_BITS - self.end_bits)
        return Halves(width) if len(self.thresholds) > 1 else Digits(width - width // 2, width // 2)

    @cached_property
    def inside(self) -> Formula:
        """1 where the table applies, as a formula of the compared bits."""
        if self.left and self.right:
            return Formula(added(self._below[1], self._below[0], -1))
        return Formula(self._below[0] if self.right else negated(self._below[0]))

    @cached_property
    def outside(self) -> list[tuple[Formula, Tail]]:
        """1 where each tail applies, as formulas. A tail that is zero is left out."""
        formulas = ((self._below[0], self.left), (negated(self._below[-1]), self.right))
        return [(Formula(f), tail) for f, tail in formulas if tail and (tail.slope or tail.value)]

    @property
    def _below(self) -> list[Polynomial]:
        less, bits = self.comparer.less, self.comparer.bits
        return [shifted(less, bits * i) for i in range(len(self.thresholds))]

    def selections(self, out_frac: int) -> tuple[Selection, list[Selection]]:
        """The terms of the result with `out_frac` fractional bits: the table's value, and tails."""
        shift = self.table.out_frac - WINDOW_BITS - out_frac
        tails = [Selection(formula, tail.line(out_frac)) for formula, tail in self.outside]
        return Selection(self.inside, Line(shift)), tails


@cache
def _served(function: Function, fine: Function | None, reach: int) -> Function:
    return replace(function, fine=fine, reach=reach)


def reach_for(largest: float) -> int:
    """The smallest of `REACHES` for inputs that calibration saw up to `largest`; 0 if none is."""
    needed = largest * 2.0**RANGE_MARGIN_BITS
    return next((reach for reach in REACHES if needed <= 2.0**reach - _ENDS), 0)


def supplies_of(reach: int) -> Iterator[dict[str, int]]:
    """For `Op.supplies` of an op with an argument `reach`."""
    return ({"reach": taken} for taken in dict.fromkeys((0, reach)))


def saturating(
    function: Callable[[np.ndarray], np.ndarray],
    start: float,
    windows: int,
    step_bits: int,
    out_frac: int,
    end_bits: int,
    left: Tail | None,
    right: Tail | None,
    served: Function | None = None,
) -> Function:
    """Fit `function` from `start` on, with `windows` windows of 2**step_bits input units each.

    At least one tail is required. A tail must hold in the first unit of 2**end_bits and in the last
    two. `out_frac` applies to the table, whose values must stay below 2**62. served: the same
    function for `Function.from_server`. Raises ValueError if a unit is smaller than a window.
    """
    if end_bits < step_bits:
        raise ValueError(f"ends in units of 2**{end_bits} cut windows of 2**{step_bits}")
    scale = 2**FRACTIONAL_BITS
    # The cube of the position in a window must leave enough bits for its coefficient.
    drop = max(0, step_bits - _POSITION_BITS)
    first = round(start * scale)
    table = fit(function, FRACTIONAL_BITS, first, windows, step_bits, out_frac, drop)
    reach = windows << step_bits
    fine = fit_finely(
        function,
        FRACTIONAL_BITS,
        first - (reach // 2 if left and right else reach if left else 0),
        windows << (FINER_BITS + 1),
        step_bits - FINER_BITS,
        out_frac - 1,
        max(0, step_bits - FINER_BITS - _POSITION_BITS),
    )
    return Function(table, end_bits, left, right, Function(fine, end_bits, left, right), served)


def function_input(ctx: Context, x: Shared) -> Cut:
    """The window of x that `apply` takes; of up to 48 fractional bits of x, 16 are used.

    Raises ValueError if x has more.
    """
    return cut(ctx, x.share, x.frac - FRACTIONAL_BITS)


def apply(
    ctx: Context,
    function: Function,
    x: Cut,
    out_frac: int,
    factor: Shared | None = None,
) -> Protocol:
    """Shares modulo 2**64 of f(x) with `out_frac` fractional bits, or of f(x) * factor.

    In: x to 16 fractional bits (`function_input`), any shape, |x| < 2**14. With a factor (Shared,
    same shape) the result also has the program's fractional bits. Rounds 2, with exact rounding 4.
    Online 18 bytes per element; with a factor, 16 more and those of its truncation. The table's
    value is opened under a mask to truncate it, in the same round as the compared bits. The dealer
    shares the products of mask bits, times the words that make up the table's value and x, and each
    of these times the factor's mask (`selection`). Each party sees the openings of a window, of the
    table's value, of bits and of the factor, each under a fresh, uniform mask; with exact rounding,
    the client sees of the first two what `open_high` says. Of a function `from_server`, the client
    is dealt nothing, and the server what is uniform beside all this (`pieces`, `digits`): shares of
    tables, whose other share is fresh words of the client's stream. With exact rounding the table
    of such a function is the finer one, whose keys go to both.
    """
    if ctx.exact and function.fine is not None:
        function = function.fine
    shape, count = x.share.shape, x.share.numel()
    wide = x.mask(ctx)
    mask = x.narrow(wide)
    comparer = function.comparer
    dealt = comparer.deal(ctx, count, lambda: mask.long() >> function.end_bits)
    first = [x.open(ctx, wide)]
    if factor is not None:
        flat = factor.share.reshape(-1)
        first.append(truncate(ctx, flat, factor.frac - ctx.fixed))
    opened, *truncated = yield from together(*first)
    inside, tails = function.selections(out_frac)
    looked_up = _look_up(ctx, opened, mask, function.table)
    value = table_value(ctx, looked_up, inside.line.shift)
    wide_mask = value.mask(ctx)
    value_mask = value.narrow(wide_mask)
    bit_mask = ctx.mask_bits((count,))
    second = [
        open_bits(ctx, _compare(function, opened, dealt), bit_mask),
        value.open(ctx, wide_mask, NARROW_OFFSET),
        *(open_masked(ctx, Shared(share, ctx.fixed)) for share in truncated),
    ]
    # The factor must be opened before the words that are multiplied by its mask are dealt.
    bits, found, *factors = yield from together(*second)
    up = factors[0] if factors else None
    dealt_inside = inside.deal(ctx, bit_mask, value_mask, up)
    dealt_tails = [tail.deal(ctx, bit_mask, mask, up) for tail in tails]
    if x.share.is_meta:
        return ghost(shape)
    total = torch.zeros(count, dtype=torch.int64, device=x.share.device)
    inside.add(total, bits, dealt_inside, found, up)
    for tail, words in zip(tails, dealt_tails, strict=True):
        tail.add(total, bits, words, opened + NARROW_OFFSET, up)
    return total.reshape(shape)


def table_value(ctx: Context, value: torch.Tensor, shift: int) -> Cut:
    """The upper 32 bits of a table's value, of which `shift` more are rounded off after opening."""
    if ctx.exact:
        return Cut(value, WINDOW_BITS, WINDOW_BITS + shift)
    return Cut(take_window(value, WINDOW_BITS))


def apply_cost(function: Function, count: int, factor_shift: int | None = None) -> Cost:
    """Cost of `apply` for `count` elements; factor_shift: bits that the factor is truncated by."""
    first = Cost(rounds=1, online=8 * count, offline=function.comparer.dealt_bytes * count)
    second = Cost(rounds=1, online=10 * count)
    factors = 0 if factor_shift is None else 1
    inside, tails = function.selections(FRACTIONAL_BITS)
    words = sum(selection.words(factors) for selection in (inside, *tails))
    if factor_shift is not None:
        first = first.beside(truncate_cost(count, factor_shift))
        second = second.beside(open_masked_cost(count))
    table = function.table
    read = table.cost(count) if isinstance(table, Pieces) else evaluate_cost(count, table)
    return first + second + read + Cost(offline=8 * words * count)


def _look_up(
    ctx: Context, opened: torch.Tensor, mask: torch.Tensor, table: Table | Pieces
) -> torch.Tensor:
    if isinstance(table, Pieces):
        return table.evaluate(ctx, opened, mask)
    return evaluate(ctx, opened, mask, table)


def _compare(function: Function, opened: torch.Tensor, dealt: Any) -> torch.Tensor:
    """The bits of all comparisons of an element, in one byte."""
    if opened.is_meta:
        return ghost(opened.shape, dtype=torch.uint8)
    comparer = function.comparer
    points = _POINTS(opened, function.table.start, function.end_bits, tuple(function.thresholds))
    found = comparer.look_up(points, dealt)
    byte = found[0]
    for i in range(1, len(found)):
        byte = byte | found[i] << (comparer.bits * i)
    return byte


def _points_host(
    opened: torch.Tensor, start: int, end_bits: int, thresholds: tuple[int, ...]
) -> torch.Tensor:
    points = torch.empty((len(thresholds), len(opened)), dtype=torch.int64)
    _subtract_ends(opened.numpy(), start, end_bits, np.array(thresholds), points.numpy())
    return points


def _points_tensors(
    opened: torch.Tensor, start: int, end_bits: int, thresholds: tuple[int, ...]
) -> torch.Tensor:
    place = (opened.long() - start) >> end_bits
    return place - integers(thresholds, opened.device)[:, None]


_POINTS = Kernel("saturate.points", _points_host, _points_tensors, triton=False)


@compiled()
def _subtract_ends(opened, start, end_bits, thresholds, points):  # type: ignore[no-untyped-def]
    for t in range(points.shape[0]):
        row = points[t]
        for i in range(row.shape[0]):
            row[i] = ((np.int64(opened[i]) - start) >> end_bits) - thresholds[t]
