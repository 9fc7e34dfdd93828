"""RMSNorm over the last dimension; the gain is `weight + offset` (gemma stores gain - 1)."""

from __future__ import annotations

import math
from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.crypten.domain import norm_factor
from mergec.runtime.protocols.gain import apply_gain, gain_cost
from mergec.runtime.protocols.normalize import SCALED_FRAC, RowNorm, normalize, normalize_cost
from mergec.runtime.protocols.weights import Constant


class RmsNorm(Op):
    """RMSNorm over the last dimension; the gain is `weight + offset` (gemma stores gain - 1)."""

    name = "rms_norm"
    schema = "(Tensor x, Tensor? weight, float eps, float offset=0.0, float bound=0.0) -> Tensor"

    @staticmethod
    def reference(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float = 0.0,
        bound: float = 0.0,
    ) -> torch.Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y if weight is None else y * (weight + offset)

    operands = {"x": "share"}
    weights = ("weight",)

    @classmethod
    def measure(cls, x: torch.Tensor, *rest: Any) -> dict[str, float]:
        return {"mean_square": float(x.double().square().mean(-1).max())}

    @classmethod
    def scale(cls, x: int, weight: object, *args: object, fixed: int) -> int:
        return SCALED_FRAC if weight is None else SCALED_FRAC + fixed

    @classmethod
    def cost(
        cls,
        x: Shared,
        weight: Constant | None,
        eps: float,
        offset: float = 0.0,
        bound: float = 0.0,
        *,
        fixed: int,
    ) -> Cost:
        spec = RowNorm(x.shape[-1], x.frac, eps, bound)
        rows = math.prod(x.shape[:-1])
        return normalize_cost(spec, rows) + gain_cost(x.shape, weight)

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        x: Shared,
        weight: Constant | None,
        eps: float,
        offset: float = 0.0,
        bound: float = 0.0,
    ) -> Protocol:
        """`normalize`, then the gain by one opening of the rows."""
        spec = RowNorm(x.shape[-1], x.frac, eps, bound)
        share = yield from normalize(ctx, x.share, spec)
        scaled: Shared = yield from apply_gain(ctx, share, SCALED_FRAC, weight, offset)
        return scaled

    @classmethod
    def stock(cls, x: Any, weight: Any, eps: float, offset: float = 0.0, bound: float = 0.0) -> Any:
        """CrypTen's square, mean and inverse root of the row, brought into its domain first."""
        factor = norm_factor(bound)
        x = x.mul(factor)
        y = x * (x.square().mean(-1, keepdim=True) + eps * factor**2).inv_sqrt()
        if weight is None:
            return y
        return y * (weight + float(offset))
