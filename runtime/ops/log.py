"""Natural logarithm of positive numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import FRACTIONAL_BITS, Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.octave import Octaves, columns, columns_cost
from mergec.runtime.protocols.truncate import truncate, truncate_cost

_LOW, _HIGH, _FRAC = 0, 44, 58
_MIDDLE = 4.5
"""Half way between the logarithms at both ends: tables are relative to it, so that their values are
below 16."""


def _from_middle(v: np.ndarray) -> np.ndarray:
    """log(x) - _MIDDLE for x in units of 2**-16."""
    return np.log(v) - (FRACTIONAL_BITS * math.log(2.0) + _MIDDLE)


OCTAVES = Octaves(_LOW, _HIGH, _HIGH - _LOW + 1, _from_middle, _FRAC, finer=4)


class Log(Op):
    """Natural logarithm of positive numbers, element by element.

    x [...], shared -> [...], shared. Rounds 2; per element 24 bytes online, 4496 offline. For
    2**-16 <= x < 2**29: error below 2e-5, with exact rounding below 4e-5. At 0 it returns the value
    of 0.9 * 2**-16. The results of other inputs are wrong, but not larger than the largest right
    one. Each party sees what it sees in `octave.columns` and `truncate`.
    """

    name = "log"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "fixed"}
    domain = (2.0**-16, 2.0**29)
    kind = Kind.ACTIVATION

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        # All octaves of a positive number that 16 fractional bits can tell from zero.
        octaves = torch.exp2(torch.linspace(6, 44.9, 400).double())
        positive = torch.cat([torch.arange(1, 40), octaves]).round() * 2.0**-16
        # CrypTen takes two Householder steps.
        return [Case([positive], 4e-5), Case([make.uniform(6, low=0.2, high=20.2)], stock=3e-2)]

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        count = x.share.numel()
        return columns_cost(OCTAVES, count) + truncate_cost(count, _FRAC - fixed)

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """One column for all octaves, each with the logarithm itself in its table."""
        found = yield from columns(ctx, x.share.reshape(-1), OCTAVES)
        share = yield from truncate(ctx, found[:, 0], _FRAC - ctx.fixed)
        if not share.is_meta:
            middle = torch.full_like(share, round(_MIDDLE * 2**ctx.fixed))
            share = share + ctx.public(middle)
        return Shared(share.reshape(x.shape), ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's Householder iteration, for 1e-4 < x < 250."""
        return x.log()
