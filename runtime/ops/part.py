"""Columns of a product whose parts have a binary point each."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared


class Part(Op):
    """`x[..., start:end]`, where these columns have `finer` fractional bits more than `x` says.

    `mpc.linear` makes such columns where one product takes the place of several whose results have
    room for different numbers of fractional bits. Nothing else may read them: their words stand for
    numbers that are 2**finer times smaller than the others'.
    """

    name = "part"
    schema = "(Tensor x, int start, int end, int finer) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor, start: int, end: int, finer: int) -> torch.Tensor:
        return x[..., start:end]

    operands = {"x": "share"}

    @classmethod
    def scale(cls, x: int, start: int, end: int, finer: int, *, fixed: int) -> int:
        return x + finer

    @classmethod
    def cost(cls, x: Shared, start: int, end: int, finer: int, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared, start: int, end: int, finer: int) -> Protocol:
        """Local and exact: each party cuts its share and reads it with another binary point."""
        yield from ()
        return Shared(x.share[..., start:end], x.frac + finer)

    @classmethod
    def stock(cls, x: Any, start: int, end: int, finer: int) -> Any:
        """CrypTen's numbers have one binary point: the columns."""
        return x[..., start:end]
