"""Batched matrix product of two tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from mergec.runtime.core.cases import PUBLIC, Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.protocols.multiply import matmul_of_masked


class Matmul(Op):
    """Batched matrix product: a [..., N, K] and b [..., K, M] give [..., N, M].

    Both opened under a mask; the result is shared, with twice the program's fractional bits. No
    message beyond the openings of the operands; 8 bytes offline per element of the result. Exact.
    """

    name = "matmul"
    schema = "(Tensor a, Tensor b) -> Tensor"
    operands = {"a": "masked", "b": "masked"}
    kind = Kind.LINEAR

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.matmul(a, b)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, y = make.small(2, 3, 4), make.small(2, 4, 3)
        return [
            Case([make.normal(2, 3, 8), make.normal(2, 8, 4)], 2e-4),
            Case([x, y], stock=5e-4),
            Case([x, y], stock=5e-4, forms={"a": PUBLIC}),
        ]

    @classmethod
    def scale(cls, *args: object, fixed: int) -> int:
        return 2 * fixed

    @classmethod
    def cost(cls, a: Masked, b: Masked, *, fixed: int) -> Cost:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return Cost(offline=8 * math.prod((*batch, a.shape[-2], b.shape[-1])))

    @classmethod
    def protocol(cls, ctx: Context, a: Masked, b: Masked) -> Protocol:
        """A matrix triple on the opened operands; see `matmul_of_masked`."""
        yield from ()
        return Shared(matmul_of_masked(ctx, a, b), a.frac + b.frac)

    @classmethod
    def stock(cls, a: Any, b: Any) -> Any:
        """CrypTen's matrix product: one Beaver triple of matrices."""
        if isinstance(a, torch.Tensor):
            return b.transpose(-1, -2).matmul(a.transpose(-1, -2)).transpose(-1, -2)
        return a.matmul(b)
