"""`x @ weight.T + bias`: `x` [..., I], `weight` [O, I], `bias` [O] give [..., O]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost, Vis
from mergec.runtime.core.values import Held, Shared
from mergec.runtime.protocols.weights import Constant, Moving, add_held, linear


class Linear(Op):
    """`x @ weight.T + bias`: `x` [..., I], `weight` [O, I], `bias` [O] give [..., O].

    `bits` is how many fractional bits more than the program's the weight, and so the result, has.
    They cost nothing: the result is truncated anyway. The weight's rounding otherwise weighs most
    in the error, as weights are far smaller than activations.

    `parts`, if given, says how many columns have how many fractional bits more than that, as
    (columns, bits, columns, bits, ...): one product for several layers of one input, each with the
    bits that its own result leaves room for. `mpc.part` reads them.
    """

    name = "linear"
    schema = "(Tensor x, Tensor weight, Tensor? bias=None, int bits=0, int[] parts=[]) -> Tensor"

    @staticmethod
    def reference(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        bits: int = 0,
        parts: Sequence[int] = (),
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    weights = ("weight",)

    @classmethod
    def forms(
        cls, x: Any, weight: Vis, bias: Any = None, bits: int = 0, parts: Sequence[int] = ()
    ) -> dict[str, str]:
        return {"x": "masked" if weight is Vis.SHARED else "sent"}

    @classmethod
    def scale(
        cls,
        x: int,
        weight: object,
        bias: object = None,
        bits: int = 0,
        parts: Sequence[int] = (),
        *,
        fixed: int,
    ) -> int:
        return x + fixed + bits

    @classmethod
    def cost(
        cls,
        x: Moving,
        weight: Constant,
        bias: Held | Shared | None = None,
        bits: int = 0,
        parts: Sequence[int] = (),
        *,
        fixed: int,
    ) -> Cost:
        rows = math.prod(x.shape[:-1])
        return Cost(offline=8 * rows * weight.shape[0])

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        x: Moving,
        weight: Constant,
        bias: Held | Shared | None = None,
        bits: int = 0,
        parts: Sequence[int] = (),
    ) -> Protocol:
        yield from ()
        frac = x.frac + weight.frac
        share = linear(ctx, x, weight)
        return Shared(share if bias is None else add_held(share, bias, frac, parts), frac)

    @classmethod
    def stock(
        cls, x: Any, weight: Any, bias: Any = None, bits: int = 0, parts: Sequence[int] = ()
    ) -> Any:
        """CrypTen's matrix product with the shared weight, opened anew in every step."""
        result = x.matmul(weight.transpose(0, 1))
        return result if bias is None else result + bias
