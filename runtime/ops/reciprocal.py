"""1 / x for positive x."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import FRACTIONAL_BITS, Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.power import Power, power, power_cost
from mergec.runtime.protocols.truncate import truncate, truncate_cost

SPEC = Power(-1.0, FRACTIONAL_BITS, 6, 33)


class Reciprocal(Op):
    """1 / x for positive x."""

    name = "reciprocal"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.reciprocal(x)

    operands = {"x": "fixed"}
    domain = (2.0**-10, 2.0**18)

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        count = x.share.numel()
        return power_cost(SPEC, count) + truncate_cost(count, SPEC.out_frac - fixed)

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """For 2**-10 <= x < 2**18: relative error below 2**-16, and the rounding of the result.

        From 0 to 2**-10 it keeps to the value at the end, 2**10, or up to a ninth more. Other
        inputs give something wrong, but no larger than that.
        """
        share = yield from power(ctx, x.share, SPEC)
        share = yield from truncate(ctx, share, SPEC.out_frac - ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's Newton iteration."""
        from mergec.runtime.crypten import compat as crypten

        with crypten.cfg.temp_override({"functions.reciprocal_all_pos": True}):
            return x.reciprocal()
