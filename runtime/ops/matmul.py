"""Batched matrix product of two tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.protocols.multiply import matmul_of_masked


class Matmul(Op):
    """Batched matrix product of two tensors."""

    name = "matmul"
    schema = "(Tensor a, Tensor b) -> Tensor"

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.matmul(a, b)

    operands = {"a": "masked", "b": "masked"}

    @classmethod
    def scale(cls, *args: object, fixed: int) -> int:
        return 2 * fixed

    @classmethod
    def cost(cls, a: Masked, b: Masked, *, fixed: int) -> Cost:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return Cost(offline=8 * math.prod((*batch, a.shape[-2], b.shape[-1])))

    @classmethod
    def protocol(cls, ctx: Context, a: Masked, b: Masked) -> Protocol:
        """No message beyond the openings of the operands; see `matmul_of_masked`."""
        yield from ()
        return Shared(matmul_of_masked(ctx, a, b), a.frac + b.frac)

    @classmethod
    def stock(cls, a: Any, b: Any) -> Any:
        """CrypTen's matrix product: one Beaver triple of matrices."""
        if isinstance(a, torch.Tensor):
            return b.transpose(-1, -2).matmul(a.transpose(-1, -2)).transpose(-1, -2)
        return a.matmul(b)
