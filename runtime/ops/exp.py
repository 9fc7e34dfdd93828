"""Exponential function of non-positive arguments and of small positive ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mergec.runtime.core.cases import Case, Sampler, spread
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.saturate import Tail, apply, apply_cost, function_input, saturating

EXP = saturating(np.exp, -15.5, 64, 14, 60, 16, left=Tail(0, 0.0), right=None)


class Exp(Op):
    """Exponential function of numbers up to 1/4, element by element.

    x [...] shared -> [...] shared. Rounds 2; per element 18 bytes online, 544 offline.
    Error below 4e-5 for
    -2**14 < x <= 1/4; the result of a larger x is wrong. Each party sees what it sees in
    `protocols.saturate.apply`: masked values that are uniform whatever x is.
    """

    name = "exp"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "window"}
    positions = Positions.ALL
    kind = Kind.ACTIVATION
    domain = (-(2.0**14), 0.25)

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([-spread(20).abs()], 5e-5),
            # (1 + x / 256) ** 256 is off by x**2 / 512 of itself, and truncated 8 times.
            Case([-make.small(2, 3, 4).abs()], stock=5e-3),
        ]

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return apply_cost(EXP, x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Cubics on windows of 1/4 above -15; 0 below.

        The compiler rejects a program whose calibration leaves the domain.
        """
        share = yield from apply(ctx, EXP, function_input(ctx, x), ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's limit (1 + x / 2**8) ** 2**8."""
        return x.exp()
