"""Exponential function of non-positive arguments and of small positive ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.saturate import Tail, apply, apply_cost, function_input, saturating

EXP = saturating(np.exp, -15.5, 64, 14, 60, 16, left=Tail(0, 0.0), right=None)


class Exp(Op):
    """Exponential function of non-positive arguments and of small positive ones."""

    name = "exp"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)

    operands = {"x": "window"}
    domain = (-(2.0**14), 0.25)

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return apply_cost(EXP, x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Error below 4e-5 for -2**14 < x <= 1/4: cubics on windows of 1/4, 0 from -15 down.

        Larger inputs give something wrong; the compiler refuses them, as it does for all domains.
        """
        share = yield from apply(ctx, EXP, function_input(ctx, x), ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's limit (1 + x / 2**8) ** 2**8."""
        return x.exp()
