"""x * x; cheaper than mul because both factors share one mask."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.protocols.multiply import product_of_masked


class Square(Op):
    """x * x; cheaper than mul because both factors share one mask."""

    name = "square"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x * x

    operands = {"x": "masked"}

    @classmethod
    def scale(cls, x: int, *, fixed: int) -> int:
        return 2 * fixed

    @classmethod
    def cost(cls, x: Masked, *, fixed: int) -> Cost:
        return Cost(offline=8 * x.opened.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Masked) -> Protocol:
        """No message beyond the opening of the operand: z**2 - 2 z r + r**2 with r**2 dealt."""
        yield from ()
        return Shared(product_of_masked(ctx, x, x), 2 * x.frac)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's square: one opening of a masked value."""
        return x.square()
