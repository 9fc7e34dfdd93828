"""RMSNorm over the last dimension."""

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
from mergec.runtime.core.values import Shared
from mergec.runtime.crypten.domain import norm_factor
from mergec.runtime.protocols.columns import factors
from mergec.runtime.protocols.gain import apply_gain, gain_cost
from mergec.runtime.protocols.normalize import (
    SCALED_FRAC,
    RowNorm,
    normalize,
    normalize_cost,
    rounded_rows,
)
from mergec.runtime.protocols.weights import Constant

_NORM_MARGIN = 2.0**4
"""The mean square of a row may become 2**4 times as large as in calibration."""


class RmsNorm(Op):
    """RMSNorm over the last dimension: x / sqrt(mean(x**2) + eps) * (weight + offset).

    x [..., D], shared at any number of fractional bits, and weight [D], a constant of the server's,
    held or shared, or none. The result [..., D] is shared. gemma stores its gain minus 1: offset is
    1 then. bound: an upper end of a row's mean square, from calibration. bits: fractional bits
    of the gain beyond the program's. Cost: `normalize_cost`,
    and for a gain one opening of the rows (`gain_cost`). Error about 2**-13 of the result. Each
    party sees what it sees in `normalize` and `apply_gain`.

    columns: those of x that stand for numbers larger by powers of two, as (columns, exponent,
    columns, exponent, ...): the row is x times these powers (`mpc.shrink` is the inverse). Columns
    of massive activations have room in the ring that way.
    """

    name = "rms_norm"
    schema = (
        "(Tensor x, Tensor? weight, float eps, float offset=0.0, float bound=0.0, int bits=0, "
        "int[] columns=[]) -> Tensor"
    )
    operands = {"x": "share"}
    weights = ("weight",)
    positions = Positions.ROWS
    kind = Kind.NORM

    @staticmethod
    def reference(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float = 0.0,
        bound: float = 0.0,
        bits: int = 0,
        columns: Sequence[int] = (),
    ) -> torch.Tensor:
        if columns:
            x = x * factors(columns).to(x)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y if weight is None else y * (weight + offset)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, wide, gain = make.normal(3, 64), make.small(3, 8) * 30, make.normal(64)
        return [
            Case([x, gain, 1e-5], 2e-4, forms={"weight": "weight"}),
            Case([x, gain, 1e-5, 1.0], 3e-4, forms={"weight": "weight"}),
            Case([x, gain, 1e-5, 1.0], 3e-4, forms={"weight": "shared"}),
            Case([x, None, 1e-5], 2e-4),
            Case([x, None, 1e-5, 0.0, 4.0**8, 0, [5, 0, 2, 3, 56, 0, 1, 6]], 4e-4),
            Case([x, gain, 1e-5, 1.0, 0.0, 0, [63, 0, 1, 4]], 3e-4, forms={"weight": "weight"}),
            Case([make.small(2, 3, 16), None, 1e-5], stock=1e-2),
            Case([wide, make.small(8), 1e-5, 1.0, 900.0 * 16], stock=1e-2),
            Case([wide, None, 1e-5, 0.0, 900.0 * 64, 0, [7, 0, 1, 1]], stock=1e-2),
        ]

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        return {"mean_square": float(arguments["x"].double().square().mean(-1).max())}

    @classmethod
    def rounded(cls, fracs: Mapping[str, int], arguments: Mapping[str, Any]) -> torch.Tensor:
        x, weight, columns = arguments["x"], arguments["weight"], arguments["columns"]
        if columns:
            x = x * factors(columns).to(x)
        norm = RowNorm(x.shape[-1], fracs["x"], arguments["eps"], arguments["bound"])
        y = rounded_rows(x, norm).to(x.dtype)
        return y if weight is None else y * (weight + arguments["offset"])

    @classmethod
    def calibrate(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return row_bound(measured)

    @classmethod
    def scale(
        cls,
        x: int,
        weight: object,
        eps: float = 0.0,
        offset: float = 0.0,
        bound: float = 0.0,
        bits: int = 0,
        columns: Sequence[int] = (),
        *,
        fixed: int,
    ) -> int:
        return SCALED_FRAC if weight is None else SCALED_FRAC + fixed + bits

    @classmethod
    def cost(
        cls,
        x: Shared,
        weight: Constant | None,
        eps: float,
        offset: float = 0.0,
        bound: float = 0.0,
        bits: int = 0,
        columns: Sequence[int] = (),
        *,
        fixed: int,
    ) -> Cost:
        spec = RowNorm(x.shape[-1], x.frac, eps, bound)
        rows = math.prod(x.shape[:-1])
        return normalize_cost(spec, rows, columns) + gain_cost(x.shape, weight)

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        x: Shared,
        weight: Constant | None,
        eps: float,
        offset: float = 0.0,
        bound: float = 0.0,
        bits: int = 0,
        columns: Sequence[int] = (),
    ) -> Protocol:
        """`normalize`, then the gain by one opening of the rows."""
        spec = RowNorm(x.shape[-1], x.frac, eps, bound)
        share = yield from normalize(ctx, x.share, spec, columns)
        scaled: Shared = yield from apply_gain(ctx, share, SCALED_FRAC, weight, offset)
        return scaled

    @classmethod
    def stock(
        cls,
        x: Any,
        weight: Any,
        eps: float,
        offset: float = 0.0,
        bound: float = 0.0,
        bits: int = 0,
        columns: Sequence[int] = (),
    ) -> Any:
        """CrypTen's square, mean and inverse root of the row, brought into its domain first."""
        factor = norm_factor(bound)
        x = x.mul(factor)
        if columns:
            x = x * factors(columns).to(torch.float32)
        y = x * (x.square().mean(-1, keepdim=True) + eps * factor**2).inv_sqrt()
        if weight is None:
            return y
        return y * (weight + float(offset))


def row_bound(measured: Mapping[str, Any]) -> dict[str, float]:
    """The `bound` of a norm, how large a mean square it has to expect, from calibration.

    Rounded up to a power of four: the program is public, and a finer bound would say more about the
    weights without changing a scale.
    """
    square = measured.get("mean_square", 0.0)
    return {"bound": 4.0 ** math.ceil(math.log(square * _NORM_MARGIN, 4))} if square else {}
