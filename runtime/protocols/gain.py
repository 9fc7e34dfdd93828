"""The gain of a norm: a constant vector times normalized rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.protocols.truncate import truncate, truncate_cost
from runtime.protocols.weights import Constant, move, move_cost, scale_by
from runtime.spec import Cost
from runtime.values import Shared


def apply_gain(
    ctx: Context, share: torch.Tensor, frac: int, weight: Constant | None, offset: float
) -> Protocol:
    """x * (weight + offset), truncated first.

    Out: Shared with twice the program's fractional bits, or with these where there is no weight.
    In: additive share [..., d] with `frac` fractional bits; weight [d]. Rounds 2 with a weight:
    a truncation and the opening that the weight wants (`weights.move`); else 1.
    """
    rows = yield from truncate(ctx, share, frac - ctx.fixed)
    if weight is None:
        return Shared(rows, ctx.fixed)
    moved = yield from move(ctx, Shared(rows, ctx.fixed), weight)
    scaled = scale_by(ctx, moved, weight)
    if offset and not scaled.is_meta:
        scaled = scaled + rows * round(offset * 2.0**ctx.fixed)
    return Shared(scaled, 2 * ctx.fixed)


def gain_cost(shape: Sequence[int], frac: int, weight: Constant | None, fixed: int) -> Cost:
    """Cost of `apply_gain` for rows of this shape."""
    count = math.prod(shape)
    first = truncate_cost(count, frac - fixed)
    return first if weight is None else first + move_cost(count, weight) + Cost(offline=8 * count)
