"""x * x; cheaper than mul because both factors share one mask."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.protocols.multiply import product_of_masked


class Square(Op):
    """x * x, element by element; cheaper than `mul`, because both factors share one mask.

    x [...], opened under a mask -> [...], shared, with twice the program's fractional bits. No
    message beyond the opening of x; 8 bytes offline per element. Exact.
    """

    name = "square"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "masked"}
    positions = Positions.ALL
    kind = Kind.NORM

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x * x

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [Case([make.normal(3, 4)], 1e-4), Case([make.small(2, 3, 4)], stock=5e-4)]

    @classmethod
    def scale(cls, x: int, *, fixed: int) -> int:
        return 2 * fixed

    @classmethod
    def cost(cls, x: Masked, *, fixed: int) -> Cost:
        return Cost(offline=8 * x.opened.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Masked) -> Protocol:
        """z**2 - 2 z r + r**2 for the opened z = x + r, with r**2 dealt."""
        yield from ()
        return Shared(product_of_masked(ctx, x, x), 2 * x.frac)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's square: one opening of a masked value."""
        return x.square()
