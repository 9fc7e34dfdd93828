"""A value that one step hands to the next; the identity."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared


class Carry(Op):
    """A value that may enter or leave a step: the identity, on a share at the program's scale.

    x [...], shared -> the same share. Local and exact: nothing is sent. See
    `runtime.program.program.Phase`.
    """

    name = "carry"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "fixed"}
    local = True
    kind = Kind.MOVEMENT

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [Case([make.normal(3, 4)], 1e-5), Case([make.small(2, 3, 4)], stock=1e-4)]

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Nothing to do."""
        yield from ()
        return x

    @classmethod
    def stock(cls, x: Any) -> Any:
        """Nothing to do."""
        return x
