"""A linear layer: `x @ weight.T + bias`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Form, Kind, Op, Positions
from mergec.runtime.core.spec import Cost, Vis
from mergec.runtime.core.values import Held, Shared
from mergec.runtime.protocols.weights import Constant, Moving, add_held, linear


class Linear(Op):
    """x @ weight.T + bias: x [..., I], weight [O, I] and bias [O] give [..., O].

    x is opened to the server (to both if the weight is shared); the weight goes under a static mask
    once in a session; the bias is held by the server, or shared. The result is shared, with the
    fractional bits of x and of the weight. No message beyond these openings; 8 bytes offline per
    element of the result. Exact. What each party sees: `protocols.weights.send` and `share_weight`.

    bits: how many fractional bits the weight, and so the result, has beyond the program's. They
    cost nothing, as the result is truncated anyway. Without them the rounding of the weight
    dominates the error, as weights are far smaller than activations.

    parts: if given, how many columns have how many fractional bits beyond that, as (columns, bits,
    columns, bits, ...): one product for several layers of one input, each with the bits that its
    own result leaves room for. `mpc.part` reads them.
    """

    name = "linear"
    schema = "(Tensor x, Tensor weight, Tensor? bias=None, int bits=0, int[] parts=[]) -> Tensor"
    weights = ("weight",)
    positions = Positions.ROWS
    kind = Kind.LINEAR

    @staticmethod
    def reference(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        bits: int = 0,
        parts: Sequence[int] = (),
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, table = make.small(2, 3, 4), make.small(7, 4)
        layer = [make.normal(2, 3, 8), make.normal(5, 8), make.normal(5)]
        held = {"weight": "weight", "bias": "held"}
        shared = {"x": "masked", "weight": "shared", "bias": "share"}
        return [
            Case(layer, 2e-4, forms=held),
            Case([make.normal(1, 8), make.normal(5, 8), None], 2e-4, forms={"weight": "weight"}),
            Case(layer, 2e-4, forms=shared),
            Case([x, table, None], stock=5e-4),
            Case([x, table, make.small(7)], stock=5e-4),
        ]

    @classmethod
    def forms(
        cls, x: Any, weight: Vis, bias: Any = None, bits: int = 0, parts: Sequence[int] = ()
    ) -> dict[str, Form]:
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
        """The opened x times the weight under its static mask; adding the bias is local."""
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
