"""Softmax over the last dimension."""

from __future__ import annotations

import math
from typing import Any

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.op import Op
from runtime.protocols.multiply import multiply, multiply_cost
from runtime.protocols.power import power, power_cost
from runtime.protocols.rows import EXP_FRAC, INVERSE, exponentials, exponentials_cost
from runtime.spec import Cost
from runtime.values import Shared


class Softmax(Op):
    """Softmax over the last dimension."""

    name = "softmax"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)

    operands = {"x": "share"}

    @classmethod
    def scale(cls, x: int, *, fixed: int) -> int:
        return EXP_FRAC + INVERSE.out_frac

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        rows = math.prod(x.shape[:-1])
        valid = torch.ones((rows, x.shape[-1]), dtype=torch.bool)
        count = valid.numel()
        return (
            exponentials_cost(valid)
            + power_cost(INVERSE, rows)
            + multiply_cost((count, rows, count))
        )

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """exp(x - max) by rows, one reciprocal per row, one Beaver product; see `rows`."""
        rows = x.share.reshape(-1, x.shape[-1])
        valid = torch.ones(rows.shape, dtype=torch.bool)
        powers = yield from exponentials(ctx, Shared(rows, x.frac), valid)
        total = powers if powers.is_meta else powers.sum(-1, keepdim=True)
        if total.is_meta:
            total = total[:, :1]
        inverse = yield from power(ctx, total, INVERSE)
        (share,) = yield from multiply(ctx, (powers, inverse))
        return Shared(share.reshape(x.shape), EXP_FRAC + INVERSE.out_frac)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's softmax: maximum by comparisons, exponential, reciprocal."""
        return x.softmax(-1)
