"""Element-wise difference of two tensors."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import PUBLIC, Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.local import as_share, shared_frac


class Sub(Op):
    """Element-wise difference of two tensors that broadcast.

    As `add`: local and exact, any number of fractional bits, the finer operand's in the result.
    """

    name = "sub"
    schema = "(Tensor a, Tensor b) -> Tensor"
    operands = {"a": "share", "b": "share"}
    local = True
    positions = Positions.ALL

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, y = make.small(2, 3, 4), make.small(2, 3, 4)
        return [
            Case([make.normal(3, 4), make.normal(3, 4)], 3e-5),
            Case([x, y], stock=1e-4),
            Case([x, y], stock=1e-4, forms={"a": PUBLIC}),
            Case([x, y], stock=1e-4, forms={"b": PUBLIC}),
        ]

    @classmethod
    def scale(cls, a: object, b: object, *, fixed: int) -> int:
        return max([frac for frac in (a, b) if isinstance(frac, int)], default=fixed)

    @classmethod
    def cost(cls, a: Any, b: Any, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, a: Any, b: Any) -> Protocol:
        """Each party subtracts its shares, aligned to the finer scale."""
        yield from ()
        frac = shared_frac(a, b, default=ctx.fixed)
        left, right = as_share(ctx, a, frac), as_share(ctx, b, frac)
        if left.is_meta or right.is_meta:
            return Shared(ghost(left.shape, right.shape), frac)
        return Shared(left - right, frac)

    @classmethod
    def stock(cls, a: Any, b: Any) -> Any:
        """CrypTen's subtraction: local."""
        return -b + a if isinstance(a, torch.Tensor) else a - b
