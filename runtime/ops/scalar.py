"""What ops have in common that are one function of each element, looked up in a table of cubics."""

from __future__ import annotations

from typing import ClassVar

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.saturate import (
    SCALAR_DOMAIN,
    Function,
    apply,
    apply_cost,
    function_input,
)


class ScalarFunction(Op, abstract=True):
    """`function` of each element: x [...] shared -> [...] shared. Rounds 2; bytes: `apply_cost`.

    Each party sees what it sees in `protocols.saturate.apply`: masked values that are uniform
    whatever x is.
    """

    function: ClassVar[Function]

    schema = "(Tensor x) -> Tensor"
    operands = {"x": "window"}
    positions = Positions.ALL
    kind = Kind.ACTIVATION
    domain = SCALAR_DOMAIN

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return apply_cost(cls.function, x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """`apply` on a window of x."""
        share = yield from apply(ctx, cls.function, function_input(ctx, x), ctx.fixed)
        return Shared(share, ctx.fixed)
