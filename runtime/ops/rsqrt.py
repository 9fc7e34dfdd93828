"""1 / sqrt(x) for positive x."""

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

SPEC = Power(-0.5, FRACTIONAL_BITS, 0, 44)


class Rsqrt(Op):
    """1 / sqrt(x) for positive x."""

    name = "rsqrt"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.rsqrt(x)

    operands = {"x": "fixed"}
    domain = (2.0**-16, 2.0**29)

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        count = x.share.numel()
        return power_cost(SPEC, count) + truncate_cost(count, SPEC.out_frac - fixed)

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """For 2**-16 <= x < 2**29: relative error below 2**-16, and the rounding of the result.

        At 0 it keeps to the value at the end, 2**8, or up to a ninth more. Other inputs give
        something wrong, but no larger than that.
        """
        share = yield from power(ctx, x.share, SPEC)
        share = yield from truncate(ctx, share, SPEC.out_frac - ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's Newton iteration, for 0.05 < x < 200."""
        return x.inv_sqrt()
