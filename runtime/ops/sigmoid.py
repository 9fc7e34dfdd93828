"""Logistic function."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.saturate import (
    SCALAR_DOMAIN,
    Tail,
    apply,
    apply_cost,
    function_input,
    saturating,
)

SIGMOID = saturating(
    lambda x: 1 / (1 + np.exp(-x)), -15, 128, 14, 60, 17, left=Tail(0, 0.0), right=Tail(0, 1.0)
)


class Sigmoid(Op):
    """Logistic function."""

    name = "sigmoid"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x)

    operands = {"x": "window"}
    domain = SCALAR_DOMAIN

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return apply_cost(SIGMOID, x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Error below 3e-5 for |x| < 2**14: cubics on windows of 1/4, 0 and 1 from +-15 on."""
        share = yield from apply(ctx, SIGMOID, function_input(ctx, x), ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's sigmoid: sign, exponential and reciprocal."""
        return x.sigmoid()
