"""Bring a share back to the program's fractional bits; the identity in the clear."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.truncate import truncate, truncate_cost


class Truncate(Op):
    """Bring a share back to the program's fractional bits; the identity in the clear."""

    name = "truncate"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    operands = {"x": "share"}

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return truncate_cost(x.share.numel(), x.frac - fixed)

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        share = yield from truncate(ctx, x.share, x.frac - ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """Nothing to do: CrypTen's products truncate by themselves."""
        return x
