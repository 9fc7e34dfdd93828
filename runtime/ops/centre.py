"""Rows minus their means."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared


class Centre(Op):
    """x - mean(x) over the last dimension: x [..., D], shared -> [..., D], shared.

    finer: 1 / D is rounded to so many fractional bits, which the result has beyond those of x. With
    12 bits more than D has, a mean is right to one part in 2**12; exactly, if D is a power of two.
    Local: no message.
    """

    name = "centre"
    schema = "(Tensor x, int finer) -> Tensor"
    operands = {"x": "share"}
    local = True
    positions = Positions.ROWS
    prepares = "x"

    @staticmethod
    def reference(x: torch.Tensor, finer: int) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([make.normal(3, 8), 3], 1e-4),
            Case([make.normal(3, 7), 15], 5e-4),
            Case([make.small(2, 3, 4), 14], stock=1e-3),
        ]

    @classmethod
    def scale(cls, x: int, finer: int, *, fixed: int) -> int:
        return x + finer

    @classmethod
    def cost(cls, x: Shared, finer: int, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared, finer: int) -> Protocol:
        """A public linear map of each party's share."""
        yield from ()
        share = x.share
        if not share.is_meta:
            part = round(2.0**finer / x.shape[-1])
            share = (share << finer) - share.sum(-1, keepdim=True) * part
        return Shared(share, x.frac + finer)

    @classmethod
    def stock(cls, x: Any, finer: int) -> Any:
        """CrypTen's mean: local, with local truncation."""
        return x - x.mean(-1, keepdim=True)
