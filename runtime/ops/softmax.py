"""Softmax over the last dimension."""

from __future__ import annotations

import math
from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.normalize import (
    SCALED_FRAC,
    open_row,
    open_row_cost,
    scale_rows,
    scale_rows_cost,
)
from mergec.runtime.protocols.power import octaves, octaves_cost
from mergec.runtime.protocols.rows import EXP_FRAC, exponentials, exponentials_cost, inverse


class Softmax(Op):
    """Softmax over the last dimension."""

    name = "softmax"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)

    operands = {"x": "share"}

    @classmethod
    def measure(cls, x: torch.Tensor) -> dict[str, float]:
        return {"score_spread": float((x.amax(-1) - x.amin(-1)).max())}

    @classmethod
    def scale(cls, x: int, *, fixed: int) -> int:
        return SCALED_FRAC

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        rows = math.prod(x.shape[:-1])
        length = x.shape[-1]
        valid = torch.ones((rows, length), dtype=torch.bool)
        spec = inverse(length)
        return (
            exponentials_cost(valid)
            + octaves_cost(spec, rows).beside(open_row_cost(valid.numel()))
            + scale_rows_cost(EXP_FRAC, spec, rows, length)
        )

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """exp(x - c) by rows with c near the maximum, divided by their sum; error below 1e-4.

        For rows up to 4096 whose scores are up to 3.2e4 apart (`rows.MAX_SPREAD`). Rounds 5 and 3
        for each level of `peak`. What each party sees is what it sees in `exponentials`,
        `open_row`, `octaves` and `scale_rows`.
        """
        rows = x.share.reshape(-1, x.shape[-1])
        valid = torch.ones(rows.shape, dtype=torch.bool)
        powers = yield from exponentials(ctx, Shared(rows, x.frac), valid)
        spec = inverse(x.shape[-1])
        row, found = yield from together(open_row(ctx, powers), octaves(ctx, powers.sum(-1), spec))
        share = yield from scale_rows(ctx, row, EXP_FRAC, found, spec)
        return Shared(share.reshape(x.shape), SCALED_FRAC)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's softmax: maximum by comparisons, exponential, reciprocal."""
        return x.softmax(-1)
