"""A value that one step hands to the next; the identity."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared


class Carry(Op):
    """Where a value may enter or leave a step: the identity, on a share at the program's scale.

    See `runtime.program.program.Phase`.
    """

    name = "carry"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    operands = {"x": "fixed"}

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Nothing to do, and nothing is sent."""
        yield from ()
        return x

    @classmethod
    def stock(cls, x: Any) -> Any:
        """Nothing to do."""
        return x
