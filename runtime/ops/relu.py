"""max(x, 0)."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.rectify import rectify, rectify_cost
from mergec.runtime.protocols.saturate import SCALAR_DOMAIN, function_input


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
