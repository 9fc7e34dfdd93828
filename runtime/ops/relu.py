"""max(x, 0)."""

from __future__ import annotations

from typing import Any

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.op import Op
from runtime.protocols.rectify import rectify, rectify_cost
from runtime.protocols.saturate import SCALAR_DOMAIN, function_input
from runtime.spec import Cost
from runtime.values import Shared


class Relu(Op):
    """max(x, 0)."""

    name = "relu"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    operands = {"x": "window"}
    domain = SCALAR_DOMAIN

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return rectify_cost(x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Exact for |x| < 2**14: the product of x, rounded to 16 fractional bits, and its sign."""
        share = yield from rectify(ctx, function_input(ctx, x))
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's comparison, by conversion to binary shares, and one product."""
        return x.relu()
