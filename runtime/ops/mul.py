"""Element-wise product of two tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from mergec.runtime.core.cases import PUBLIC, Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked, Shared, Weight, encode
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.local import as_share
from mergec.runtime.protocols.multiply import multiply, multiply_cost
from mergec.runtime.protocols.weights import move, move_cost, scale_by

_CONSTANT = (Weight, Masked)
"""A constant of the server's. Any other opened operand arrives as a share (`operands`)."""


class Mul(Op):
    """Element-wise product of two tensors that broadcast.

    Shared operands at the program's fractional bits give a shared result with twice as many. A
    constant has `bits` more, and so has the result, if the compiler finds it small. By a
    public factor: local. By a constant of the server's: 1 round, and 8 bytes online (16 if the
    constant is shared) per element of the other factor, 8 offline per element of the result. Two
    shared factors: 1 round, 16 bytes online per element of either, 8 offline per element of the
    result. Exact. Each party sees factors under fresh uniform masks (`protocols.multiply.multiply`,
    `protocols.weights.move`).
    """

    name = "mul"
    schema = "(Tensor a, Tensor b, int bits=0) -> Tensor"
    operands = {"a": "fixed", "b": "fixed"}
    weights = ("a", "b")
    positions = Positions.ALL

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor, bits: int = 0) -> torch.Tensor:
        return a * b

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, y = make.small(2, 3, 4), make.small(2, 3, 4)
        return [
            Case([make.normal(3, 4), make.normal(4)], 1e-4, forms={"b": "weight"}),
            Case([make.normal(3, 4), make.normal(3, 1)], 1e-4),
            Case([make.normal(3, 4), make.normal(4)], 1e-4, forms={"b": PUBLIC}),
            Case([make.normal(8), make.normal(3, 8)], 1e-4, forms={"a": "shared"}),
            Case([make.normal(3, 4), make.normal(4) / 2**10, 10], 1e-7, forms={"b": PUBLIC}),
            Case([x, y], stock=5e-4),
            Case([x, y], stock=5e-4, forms={"a": PUBLIC}),
            Case([x, y[0]], stock=5e-4, forms={"b": PUBLIC}),
        ]

    @classmethod
    def scale(cls, a: object, b: object, bits: int = 0, *, fixed: int) -> int:
        return 2 * fixed + bits

    @classmethod
    def cost(cls, a: Any, b: Any, bits: int = 0, *, fixed: int) -> Cost:
        size = math.prod(torch.broadcast_shapes(a.shape, b.shape))
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return Cost()
        if isinstance(a, _CONSTANT):
            a, b = b, a
        if isinstance(b, _CONSTANT):
            return move_cost(math.prod(a.shape), b) + Cost(offline=8 * size)
        return multiply_cost((math.prod(a.shape), math.prod(b.shape), size))

    @classmethod
    def protocol(cls, ctx: Context, a: Any, b: Any, bits: int = 0) -> Protocol:
        """Local by a public factor; one opening by a constant; else a Beaver triple."""
        frac = 2 * ctx.fixed + bits
        if isinstance(a, (torch.Tensor, *_CONSTANT)):
            a, b = b, a
        if isinstance(b, torch.Tensor):
            share = as_share(ctx, a, ctx.fixed)
            if share.is_meta:
                return Shared(ghost(a.shape, b.shape), frac)
            factor = to_device(encode(b, ctx.fixed + bits), share.device, "public")
            return Shared(share * factor, frac)
        if isinstance(b, _CONSTANT):
            moved = yield from move(ctx, Shared(as_share(ctx, a, ctx.fixed), ctx.fixed), b)
            return Shared(scale_by(ctx, moved, b), frac)
        (share,) = yield from multiply(
            ctx, (as_share(ctx, a, ctx.fixed), as_share(ctx, b, ctx.fixed))
        )
        return Shared(share, frac)

    @classmethod
    def stock(cls, a: Any, b: Any, bits: int = 0) -> Any:
        """CrypTen's product: Beaver triples, or local by a public factor."""
        return b * a if isinstance(a, torch.Tensor) else a * b
