"""Columns of a tensor divided by powers of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.columns import factors


class Shrink(Op):
    """Columns of a tensor divided by powers of two: x [..., D], shared -> [..., D], shared.

    columns: how many columns are divided by which power of two, as (columns, exponent, columns,
    exponent, ...). Local and exact: no message. The result has as many fractional bits more as the
    largest exponent.
    """

    name = "shrink"
    schema = "(Tensor x, int[] columns) -> Tensor"
    operands = {"x": "share"}
    local = True
    prepares = "x"

    @staticmethod
    def reference(x: torch.Tensor, columns: Sequence[int]) -> torch.Tensor:
        return x / factors(columns).to(x)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([make.normal(2, 7), [2, 0, 1, 4, 4, 1]], 1e-5),
            Case([make.small(2, 3, 4), [3, 0, 1, 2]], stock=1e-4),
        ]

    @classmethod
    def scale(cls, x: int, columns: Sequence[int], *, fixed: int) -> int:
        return x + max(columns[1::2])

    @classmethod
    def cost(cls, x: Shared, columns: Sequence[int], *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared, columns: Sequence[int]) -> Protocol:
        """Each party multiplies the other columns of its share, and reads all at a finer scale."""
        yield from ()
        most = max(columns[1::2])
        others = [most - value if place % 2 else value for place, value in enumerate(columns)]
        share = x.share if x.share.is_meta else x.share * factors(others).to(x.share)
        return Shared(share, x.frac + most)

    @classmethod
    def stock(cls, x: Any, columns: Sequence[int]) -> Any:
        """CrypTen's product with public numbers: local, with local truncation."""
        return x * (1 / factors(columns)).to(torch.float32)
