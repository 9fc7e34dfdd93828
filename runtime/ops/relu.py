"""max(x, 0)."""

from __future__ import annotations

from typing import Any

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.op import Op
from runtime.protocols.rectify import rectify, rectify_cost
from runtime.spec import Cost
from runtime.values import Shared


class Relu(Op):
    """max(x, 0)."""

    name = "relu"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    operands = {"x": "fixed"}

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return rectify_cost(x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Exact for |x| < 2**15: the product of x and its sign bit."""
        share = yield from rectify(ctx, x.share)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's comparison, by conversion to binary shares, and one product."""
        return x.relu()
