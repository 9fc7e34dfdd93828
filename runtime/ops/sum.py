"""Sum over the last dimension, which is kept."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.local import ghost


class Sum(Op):
    """Sum over the last dimension, which is kept."""

    name = "sum"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1, keepdim=True)

    operands = {"x": "share"}

    @classmethod
    def scale(cls, x: int, *, fixed: int) -> int:
        return x

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """Local: each party sums its shares."""
        yield from ()
        if x.share.is_meta:
            return Shared(ghost((*x.shape[:-1], 1)), x.frac)
        return Shared(x.share.sum(-1, keepdim=True), x.frac)

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's sum: local."""
        return x.sum(-1, keepdim=True)
