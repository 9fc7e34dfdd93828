"""Sum of a tensor and a public number."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op, Positions
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.core.values import Shared


class Shift(Op):
    """Sum of a tensor and a public number: x [...], shared -> [...], shared.

    Local: no message. The number is rounded to the fractional bits of x, which the result keeps.
    """

    name = "shift"
    schema = "(Tensor x, float amount) -> Tensor"
    operands = {"x": "share"}
    local = True
    positions = Positions.ALL

    @staticmethod
    def reference(x: torch.Tensor, amount: float) -> torch.Tensor:
        return x + amount

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([make.normal(3, 4), 1.5], 2e-5),
            Case([make.small(2, 3, 4), -1.25], stock=1e-4),
        ]

    @classmethod
    def scale(cls, x: int, amount: float, *, fixed: int) -> int:
        return x

    @classmethod
    def cost(cls, x: Shared, amount: float, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared, amount: float) -> Protocol:
        """The client adds the number to its share."""
        yield from ()
        if ctx.party != CLIENT:
            return x
        return Shared(x.share + round(amount * 2.0**x.frac), x.frac)

    @classmethod
    def stock(cls, x: Any, amount: float) -> Any:
        """CrypTen's sum with a public number: local."""
        return x.add(float(amount))
