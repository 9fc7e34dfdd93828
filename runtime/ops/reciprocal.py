"""1 / x for positive x."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler, spread
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import FRACTIONAL_BITS, Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.power import Power, power, power_cost

SPEC = Power(-1.0, FRACTIONAL_BITS, 6, 33)


class Reciprocal(Op):
    """1 / x for positive x, element by element.

    x [...], shared -> [...], shared. Rounds 2; per element 128 bytes online, 3072 offline. For
    2**-10 <= x < 2**18: relative error below 2**-16, and the rounding of the result. From 0 to
    2**-10 it returns the value at that end, 2**10, or up to a ninth more. The results of other
    inputs are wrong, but not larger than that. Each party sees what it sees in `power` and
    `truncate`.
    """

    name = "reciprocal"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "fixed"}
    positions = Positions.ALL
    domain = (2.0**-10, 2.0**18)
    kind = Kind.ACTIVATION

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.reciprocal(x)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([spread(3)[3001:].abs().clamp(0.1, 100)], 1e-3),
            Case([make.uniform(6, low=0.2, high=20.2)], stock=5e-3),
        ]

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        count = x.share.numel()
        return power_cost(SPEC, fixed, count)

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """`power` with exponent -1."""
        share = yield from power(ctx, x.share, SPEC, ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's Newton iteration."""
        from mergec.runtime.crypten import compat as crypten

        with crypten.cfg.temp_override({"functions.reciprocal_all_pos": True}):
            return x.reciprocal()
