"""Element-wise sum of two tensors, or of a tensor and a public number."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.local import as_share, ghost, shared_frac


class Add(Op):
    """Element-wise sum of two tensors, or of a tensor and a public number."""

    name = "add"
    schema = "(Tensor a, Tensor b) -> Tensor"

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    operands = {"a": "share", "b": "share"}

    @classmethod
    def scale(cls, a: object, b: object, *, fixed: int) -> int:
        return max([frac for frac in (a, b) if isinstance(frac, int)], default=fixed)

    @classmethod
    def cost(cls, a: Any, b: Any, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, a: Any, b: Any) -> Protocol:
        """Local: each party adds its shares, aligned to the finer scale."""
        yield from ()
        frac = shared_frac(a, b, default=ctx.fixed)
        left, right = as_share(ctx, a, frac), as_share(ctx, b, frac)
        if left.is_meta or right.is_meta:
            return Shared(ghost(left.shape, right.shape), frac)
        return Shared(left + right, frac)

    @classmethod
    def stock(cls, a: Any, b: Any) -> Any:
        """CrypTen's addition: local."""
        return b + a if isinstance(a, torch.Tensor) else a + b
