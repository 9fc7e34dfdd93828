"""The gain of a norm: a constant vector times normalized rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.weights import Constant, move, move_cost, scale_by


def apply_gain(
    ctx: Context, share: torch.Tensor, frac: int, weight: Constant | None, offset: float
) -> Protocol:
    """x * (weight + offset).

    In: additive share [..., d] with `frac` fractional bits; weight [d]. Out: Shared, to whose
    fractional bits those of the weight are added; without a weight, x itself. Rounds 1 with a
    weight, for the opening that it requires (`weights.move`, which also says what each party sees).
    Entries of normalized rows are at most sqrt(d), so with 48 fractional bits, gains up to
    2**14 / sqrt(d) fit.
    """
    if weight is None:
        return Shared(share, frac)
    moved = yield from move(ctx, Shared(share, frac), weight)
    scaled = scale_by(ctx, moved, weight)
    if offset and not scaled.is_meta:
        scaled = scaled + share * round(offset * 2.0**weight.frac)
    return Shared(scaled, frac + weight.frac)


def gain_cost(shape: Sequence[int], weight: Constant | None) -> Cost:
    """Cost of `apply_gain` for rows of this shape. Rounds 0 and no bytes without a weight."""
    count = math.prod(shape)
    return Cost() if weight is None else move_cost(count, weight) + Cost(offline=8 * count)
