"""max(x, 0)."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler, spread
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.rectify import rectify, rectify_cost
from mergec.runtime.protocols.saturate import SCALAR_DOMAIN, function_input


class Relu(Op):
    """max(x, 0), element by element.

    x [...] shared -> [...] shared. Rounds 2; per element 10 bytes online, 1064 offline.
    Exact for |x| < 2**14, up to
    the rounding of x to 16 fractional bits. Each party sees what it sees in
    `protocols.rectify.rectify`: masked values that are uniform whatever x is.
    """

    name = "relu"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "window"}
    positions = Positions.ALL
    kind = Kind.ACTIVATION
    domain = SCALAR_DOMAIN

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [Case([spread(20)], 4e-5), Case([make.small(2, 3, 4)], stock=1e-4)]

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return rectify_cost(x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """The product of x, rounded to 16 fractional bits, and whether it is positive."""
        share = yield from rectify(ctx, function_input(ctx, x))
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's comparison, by conversion to binary shares, and one product."""
        return x.relu()
