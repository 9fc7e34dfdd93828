"""Scalar functions that are simple far from zero: a table in the middle, a line on either side."""

from __future__ import annotations

from collections.abc import Callable
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
from runtime.protocols.truncate import truncate, truncate_cost
from runtime.spec import FRACTIONAL_BITS, Cost

_POSITION_BITS = 14


@dataclass(frozen=True)
class Tail:
    """The function outside the table: slope * x + value, with an integer slope."""

    slope: int
    value: float


@dataclass(frozen=True, eq=False)
class Function:
    """A scalar function on inputs with 16 fractional bits.

    low, high: the table serves low <= x < high; below `low` the left tail holds, from `high` on
    the right one (a missing tail: such inputs don't occur). Inputs must satisfy |x| < 2**15 - high.
    """

    table: Table
    low: float
    high: float
    left: Tail | None
    right: Tail | None

    def thresholds(self) -> list[int]:
        """Where a tail begins, in units of the input."""
        scale = 2**FRACTIONAL_BITS
        low = [round(self.low * scale)] if self.left else []
        high = [round(self.high * scale)] if self.right else []
        return low + high


def saturating(
    function: Callable[[np.ndarray], np.ndarray],
    start: float,
    windows: int,
    step_bits: int,
    out_frac: int,
    left: Tail | None,
    right: Tail | None,
) -> Function:
    """Fit `function` from `start` on, `windows` windows of 2**step_bits input units each."""
    scale = 2**FRACTIONAL_BITS
    # The cube of the position in a window must leave room for its coefficient.
    drop = max(0, step_bits - _POSITION_BITS)
    table = fit(function, FRACTIONAL_BITS, round(start * scale), windows, step_bits, out_frac, drop)
    # Inputs are known to one unit only, so the ends of the table keep a window's distance.
    step = 2**step_bits / scale
    return Function(table, start + step, start + (windows - 2) * step, left, right)


def apply(ctx: Context, function: Function, share: torch.Tensor, out_frac: int) -> Protocol:
    """Shares modulo 2**64 of f(x) with `out_frac` fractional bits.

    In: additive share of x with 16 fractional bits, any shape, |x| < 2**15 - high: modulo 2**64,
    or modulo 2**32 (int32) where no tail has a slope. Rounds: 3 with a tail, else 2. What each
    party sees: the openings of a window, of comparison bits, of a truncation and of a Beaver
    product, each under a fresh mask.
    """
    shape = share.shape
    narrow = share if share.dtype is torch.int32 else take_window(share, 0)
    window = yield from open_window(ctx, narrow)
    value = evaluate(ctx, window.opened, window.mask, function.table)
    shift = function.table.out_frac - out_frac
    tails = [tail for tail in (function.left, function.right) if tail]
    if not tails:
        value = yield from truncate(ctx, value, shift)
        return value.reshape(shape)
    flags, value = yield from together(
        less_than(ctx, window, function.thresholds()), truncate(ctx, value, shift)
    )
    flat = share.reshape(-1)
    pairs = []
    for index, tail in enumerate(tails):
        if value.is_meta:
            pairs.append((flags[index], value))
            continue
        flag = flags[index]
        if tail is function.right:
            flag = ctx.public(torch.ones_like(flag)) - flag
        line = ctx.public(torch.full_like(value, round(tail.value * 2**out_frac)))
        if tail.slope:
            line = line + tail.slope * (flat << (out_frac - FRACTIONAL_BITS))
        pairs.append((flag, line - value))
    corrections = yield from multiply(ctx, *pairs)
    if not value.is_meta:
        for correction in corrections:
            value = value + correction
    return value.reshape(shape)


def apply_cost(function: Function, count: int, out_frac: int) -> Cost:
    """Cost of `apply` for `count` elements."""
    tails = len(function.thresholds())
    middle = truncate_cost(count, function.table.out_frac - out_frac)
    if tails:
        middle = middle.beside(less_than_cost(count, tails))
    total = open_window_cost(count) + evaluate_cost(count, function.table) + middle
    return total + multiply_cost(*[(count, count, count)] * tails) if tails else total
