"""Columns of a product whose parts have different binary points."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared, Wide
from mergec.runtime.protocols.wide import each_half


class Part(Op):
    """x[..., start:end], whose words have `finer` fractional bits more than those of x.

    Local and exact: no message. `mpc.linear` makes such columns where one product replaces several
    whose results have room for different numbers of fractional bits. Nothing else may read these
    columns of x: their words stand for numbers that are 2**finer times smaller than the others'.
    """

    name = "part"
    schema = "(Tensor x, int start, int end, int finer) -> Tensor"
    operands = {"x": "share"}
    local = True
    kind = Kind.MOVEMENT

    @staticmethod
    def reference(x: torch.Tensor, start: int, end: int, finer: int) -> torch.Tensor:
        return x[..., start:end]

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([make.normal(2, 7), 2, 5, 0], 1e-5),
            Case([make.small(2, 3, 4), 1, 3, 2], stock=1e-4),
        ]

    @classmethod
    def scale(cls, x: int, start: int, end: int, finer: int, *, fixed: int) -> int:
        return x + finer

    @classmethod
    def cost(cls, x: Shared, start: int, end: int, finer: int, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared | Wide, start: int, end: int, finer: int) -> Protocol:
        """Each party cuts its share and reads it with another binary point."""
        yield from ()
        columns = slice(start, end)
        if isinstance(x, Wide):
            found = each_half(x, lambda half: half[..., columns])
            return Wide(found.low, found.high, x.frac + finer)
        return Shared(x.share[..., columns], x.frac + finer)

    @classmethod
    def stock(cls, x: Any, start: int, end: int, finer: int) -> Any:
        """CrypTen's numbers have one binary point: the columns."""
        return x[..., start:end]
