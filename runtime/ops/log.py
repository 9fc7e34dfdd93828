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
from mergec.runtime.protocols.power import Octaves, find_octave, find_octave_cost, level_tables
from mergec.runtime.protocols.truncate import truncate, truncate_cost

_FINE_BITS = 24
_STEP = 2
OCTAVES = Octaves(0, 44, _FINE_BITS, _STEP, level_tables(np.log, _STEP))


class Log(Op):
    """Natural logarithm of positive numbers, element by element.

    x [...], shared -> [...], shared. Rounds 3; per element 260 bytes online, 37530 offline. For
    2**-16 <= x < 2**29: error below 2e-5. At 0 it returns the value of 0.9 * 2**-16. The results of
    other inputs are wrong, but not larger than the largest right one. Each party sees what it sees
    in `find_octave` and `truncate`.
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
        return [Case([positive], 3e-5), Case([make.uniform(6, low=0.2, high=20.2)], stock=3e-2)]

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        count = x.share.numel()
        return find_octave_cost(OCTAVES, count) + truncate_cost(count, _FINE_BITS - fixed)

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """log(w 4**k) = log(w) + k log(4).

        The table of the level k that x lies in returns log(w); k is the number of levels that x is
        not below.
        """
        found, below = yield from find_octave(ctx, x.share.reshape(-1), OCTAVES)
        share = found.sum(-1)
        if not share.is_meta:
            levels = ctx.public(torch.full_like(share, OCTAVES.levels - 1)) - below.sum(-1)
            unit = math.log(2.0) * 2**_FINE_BITS
            start = torch.full_like(share, round(FRACTIONAL_BITS * unit))
            share = share + levels * round(_STEP * unit) - ctx.public(start)
        share = yield from truncate(ctx, share, _FINE_BITS - ctx.fixed)
        return Shared(share.reshape(x.shape), ctx.fixed)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's Householder iteration, for 1e-4 < x < 250."""
        return x.log()
