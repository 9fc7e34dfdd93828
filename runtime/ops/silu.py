"""SiLU, x * sigmoid(x)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.op import Op
from runtime.protocols.saturate import Tail, apply, apply_cost, saturating
from runtime.spec import Cost
from runtime.values import Shared

SILU = saturating(
    lambda x: x / (1 + np.exp(-x)), -16, 128, 14, 57, left=Tail(0, 0.0), right=Tail(1, 0.0)
)


class Silu(Op):
    """SiLU, x * sigmoid(x)."""

    name = "silu"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x)

    operands = {"x": "fixed"}

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return apply_cost(SILU, x.share.numel(), fixed)

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Error below 3e-5 for |x| < 2**14: cubics on windows of 1/4, 0 and x beyond +-15.5."""
        share = yield from apply(ctx, SILU, x.share, ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """By CrypTen's sigmoid."""
        return x * x.sigmoid()
