"""Bring a share back to the program's fractional bits; the identity in the clear."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared, Wide
from mergec.runtime.protocols.truncate import truncate, truncate_cost
from mergec.runtime.protocols.wide import narrow


class Truncate(Op):
    """Bring a share back to the program's fractional bits; the identity in the clear.

    x [...], shared at any number of fractional bits -> [...], shared. Rounds 1; per element 16
    bytes online (8 if 32 bits or more are dropped), 16 offline; nothing if there is nothing to
    drop, or if x is shared modulo 2**128. Error below one unit of the last place. Each party sees
    x under a fresh uniform mask.
    """

    name = "truncate"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "share"}
    kind = Kind.OPENING
    prepares = "x"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [Case([make.normal(3, 4)], 3e-5), Case([make.small(2, 3, 4)], stock=1e-4)]

    @classmethod
    def cost(cls, x: Shared | Wide, *, fixed: int) -> Cost:
        if isinstance(x, Wide):
            return Cost()
        return truncate_cost(x.share.numel(), x.frac - fixed)

    @classmethod
    def protocol(cls, ctx: Context, x: Shared | Wide) -> Protocol:
        """See `protocols.truncate.truncate`, and for a wide share `protocols.wide.narrow`."""
        if isinstance(x, Wide):
            return Shared(narrow(ctx, x, x.frac - ctx.fixed), ctx.fixed)
        share = yield from truncate(ctx, x.share, x.frac - ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """Nothing to do: CrypTen's products truncate their results."""
        return x
