"""`x @ weight.T + bias`: `x` [..., I], `weight` [O, I], `bias` [O] give [..., O]."""

from __future__ import annotations

import math
from typing import Any

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.op import Op
from runtime.protocols.weights import Constant, Moving, add_held, linear
from runtime.spec import Cost, Vis
from runtime.values import Held, Shared


class Linear(Op):
    """`x @ weight.T + bias`: `x` [..., I], `weight` [O, I], `bias` [O] give [..., O]."""

    name = "linear"
    schema = "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"

    @staticmethod
    def reference(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    weights = ("weight",)

    @classmethod
    def forms(cls, x: Any, weight: Vis, bias: Any = None) -> dict[str, str]:
        return {"x": "masked" if weight is Vis.SHARED else "sent"}

    @classmethod
    def scale(cls, *args: object, fixed: int) -> int:
        return 2 * fixed

    @classmethod
    def cost(
        cls, x: Moving, weight: Constant, bias: Held | Shared | None = None, *, fixed: int
    ) -> Cost:
        rows = math.prod(x.shape[:-1])
        return Cost(offline=8 * rows * weight.shape[0])

    @classmethod
    def protocol(
        cls, ctx: Context, x: Moving, weight: Constant, bias: Held | Shared | None = None
    ) -> Protocol:
        yield from ()
        frac = x.frac + weight.frac
        share = linear(ctx, x, weight)
        return Shared(share if bias is None else add_held(share, bias, frac), frac)

    @classmethod
    def stock(cls, x: Any, weight: Any, bias: Any = None) -> Any:
        """CrypTen's matrix product with the shared weight, opened anew in every step."""
        result = x.matmul(weight.transpose(0, 1))
        return result if bias is None else result + bias
