"""Sum over the last dimension, which stays as a dimension of size 1."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.kernels.ghosts import ghost


class Sum(Op):
    """Sum over the last dimension: x [..., D], shared -> [..., 1], shared.

    Local and exact: no message, and the fractional bits of x.
    """

    name = "sum"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "share"}
    local = True

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1, keepdim=True)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [Case([make.normal(3, 8)], 1e-4), Case([make.small(2, 3, 4)], stock=1e-4)]

    @classmethod
    def scale(cls, x: int, *, fixed: int) -> int:
        return x

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Each party sums its shares."""
        yield from ()
        if x.share.is_meta:
            return Shared(ghost((*x.shape[:-1], 1)), x.frac)
        return Shared(x.share.sum(-1, keepdim=True), x.frac)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's sum: local."""
        return x.sum(-1, keepdim=True)
