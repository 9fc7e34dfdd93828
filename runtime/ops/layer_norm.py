"""LayerNorm over the last dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Held, Shared
from mergec.runtime.crypten.domain import norm_factor
from mergec.runtime.ops.rms_norm import row_bound
from mergec.runtime.protocols.gain import apply_gain, gain_cost
from mergec.runtime.protocols.normalize import (
    SCALED_FRAC,
    RowNorm,
    normalize,
    normalize_cost,
    rounded_rows,
)
from mergec.runtime.protocols.weights import Constant, add_held


class LayerNorm(Op):
    """LayerNorm over the last dimension.

    x [..., D], shared at any number of fractional bits; weight and bias [D], constants of the
    server's, held or shared, or none. The result [..., D] is shared. bound: an upper end of a
    centred row's mean square, from calibration. bits: fractional bits of the gain beyond the
    program's. Cost and error as in `rms_norm`; rows are centred
    locally. Each party sees what it sees in `normalize` and `apply_gain`.
    """

    name = "layer_norm"
    schema = (
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, float bound=0.0, int bits=0) -> Tensor"
    )
    operands = {"x": "share"}
    weights = ("weight",)
    positions = Positions.ROWS
    kind = Kind.NORM

    @staticmethod
    def reference(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        bound: float = 0.0,
        bits: int = 0,
    ) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, gain, bias = make.normal(3, 48) + 2, make.normal(48), make.normal(48)
        small, wide = make.small(2, 3, 16), make.small(3, 8) * 30
        shared = {"weight": "shared", "bias": "share"}
        return [
            Case([x, gain, bias, 1e-5], 2e-4, forms={"weight": "weight", "bias": "held"}),
            Case([x, gain, bias, 1e-5], 2e-4, forms=shared),
            Case([x, None, None, 1e-5], 2e-4),
            Case([wide, make.small(8), make.small(8), 1e-5, 900.0 * 16], stock=1e-2),
            Case([small, None, None, 1e-5], stock=1e-2),
        ]

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        rows = arguments["x"].double()
        rows = rows - rows.mean(-1, keepdim=True)
        return {"mean_square": float(rows.square().mean(-1).max())}

    @classmethod
    def scale(
        cls,
        x: int,
        weight: object,
        bias: object = None,
        eps: float = 0.0,
        bound: float = 0.0,
        bits: int = 0,
        *,
        fixed: int,
    ) -> int:
        return SCALED_FRAC if weight is None else SCALED_FRAC + fixed + bits

    @classmethod
    def inner_bits(cls, shape: Sequence[int]) -> float:
        """It centres a row as d x - sum(x)."""
        return math.log2(2 * shape[-1])

    @classmethod
    def rounded(cls, fracs: Mapping[str, int], arguments: Mapping[str, Any]) -> torch.Tensor:
        x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
        centred = x.double() - x.double().mean(-1, keepdim=True)
        spec = cls._spec(x.shape[-1], fracs["x"], arguments["eps"], arguments["bound"])
        y = rounded_rows(centred, spec).to(x.dtype)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    @classmethod
    def calibrate(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return row_bound(measured)

    @staticmethod
    def _spec(size: int, frac: int, eps: float, bound: float) -> RowNorm:
        # Rows are centred as d x - sum(x), which is exact and local: they carry log2(d) bits more.
        return RowNorm(size, frac + math.log2(size), eps, bound)

    @classmethod
    def cost(
        cls,
        x: Shared,
        weight: Constant | None,
        bias: Held | Shared | None,
        eps: float,
        bound: float = 0.0,
        bits: int = 0,
        *,
        fixed: int,
    ) -> Cost:
        spec = cls._spec(x.shape[-1], x.frac, eps, bound)
        rows = math.prod(x.shape[:-1])
        return normalize_cost(spec, rows) + gain_cost(x.shape, weight)

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        x: Shared,
        weight: Constant | None,
        bias: Held | Shared | None,
        eps: float,
        bound: float = 0.0,
        bits: int = 0,
    ) -> Protocol:
        """Centre the rows locally, then as `rms_norm`; adding the bias is local."""
        spec = cls._spec(x.shape[-1], x.frac, eps, bound)
        centred = x.share
        if not centred.is_meta:
            centred = centred * x.shape[-1] - centred.sum(-1, keepdim=True)
        share = yield from normalize(ctx, centred, spec)
        scaled: Shared = yield from apply_gain(ctx, share, SCALED_FRAC, weight, 0.0)
        if bias is None:
            return scaled
        return Shared(add_held(scaled.share, bias, scaled.frac), scaled.frac)

    @classmethod
    def stock(
        cls, x: Any, weight: Any, bias: Any, eps: float, bound: float = 0.0, bits: int = 0
    ) -> Any:
        """CrypTen's mean, square and inverse root of the row, brought into its domain first."""
        factor = norm_factor(bound)
        x = (x - x.mean(-1, keepdim=True)).mul(factor)
        y = x * (x.square().mean(-1, keepdim=True) + eps * factor**2).inv_sqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias
