"""Open a share to both parties under a mask; the identity in the clear."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.protocols.opening import open_masked, open_masked_cost


class Open(Op):
    """Open a share to both parties under a mask; the identity in the clear."""

    name = "open"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    operands = {"x": "share"}

    @classmethod
    def scale(cls, x: int, *, fixed: int) -> int:
        return x

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return open_masked_cost(x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        opened: Masked = yield from open_masked(ctx, x)
        return opened

    @classmethod
    def stock(cls, x: Any) -> Any:
        """Nothing to do: CrypTen's products open what they need by themselves."""
        return x
