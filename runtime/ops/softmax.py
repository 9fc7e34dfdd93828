"""Softmax over the last dimension."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.normalize import (
    SCALED_FRAC,
    open_row,
    open_row_cost,
    row_factor,
    row_factor_cost,
    scale_rows,
    scale_rows_cost,
)
from mergec.runtime.protocols.rows import (
    EXP_FRAC,
    HISTOGRAM,
    MAX_SPREAD,
    PAIRS,
    SHIFTS,
    exponentials,
    exponentials_cost,
    inverse,
    shift_supplies,
    shift_variants,
)


class Softmax(Op):
    """Softmax over the last dimension: x [..., D], shared -> [..., D], shared.

    x with up to 48 fractional bits, in rows of up to 4096 whose numbers are up to 3.2e4 apart
    (`rows.MAX_SPREAD`). The result has 32 fractional bits. Error below 1e-4. Rounds 4, and 3 for
    each level of `peak`, or 4 for `crest`. Each party sees what it sees in `exponentials`,
    `open_row` and `row_factor`.

    shift: how the number near the maximum is found that rows are shifted by, one of `rows.SHIFTS`.
    """

    name = "softmax"
    schema = "(Tensor x, str shift='pairs') -> Tensor"
    operands = {"x": "window"}
    positions = Positions.ROWS
    kind = Kind.ATTENTION

    @staticmethod
    def reference(x: torch.Tensor, shift: str = PAIRS) -> torch.Tensor:
        return torch.softmax(x, -1)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, far = make.small(2, 3, 4), torch.tensor([[1e4, -1e4, 1e4 - 1.0]], dtype=torch.float64)
        return [
            Case([make.normal(5, 37, scale=8)], 1e-4),
            Case([far], 1e-4),
            Case([make.normal(5, 53, scale=8), HISTOGRAM], 1e-4),
            Case([far, HISTOGRAM], 1e-4),
            *(Case([far, way], 1e-4) for way in SHIFTS if way not in (PAIRS, HISTOGRAM)),
            Case([x], stock=5e-3),
            Case([x[..., :1]], stock=5e-3),
        ]

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        x = arguments["x"]
        return {"score_spread": float((x.amax(-1) - x.amin(-1)).max())}

    @classmethod
    def refusal(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        return too_far_apart(measured)

    @classmethod
    def scale(cls, x: int, shift: str = PAIRS, *, fixed: int) -> int:
        return SCALED_FRAC

    @classmethod
    def variants(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """Histograms take fewer rounds, pairs fewer dealt bytes."""
        return shift_variants()

    @classmethod
    def supplies(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        return shift_supplies(arguments["shift"])

    @classmethod
    def cost(cls, x: Shared, shift: str = PAIRS, *, fixed: int) -> Cost:
        rows = math.prod(x.shape[:-1])
        length = x.shape[-1]
        valid = torch.ones((rows, length), dtype=torch.bool)
        spec = inverse(length, shift)
        return (
            exponentials_cost(valid, shift)
            + row_factor_cost(spec, rows).beside(open_row_cost(valid.numel()))
            + scale_rows_cost(EXP_FRAC, spec, rows, length)
        )

    @classmethod
    def protocol(cls, ctx: Context, x: Shared, shift: str = PAIRS) -> Protocol:
        """exp(x - c) by rows, with c near the maximum, divided by their sum."""
        rows = x.share.reshape(-1, x.shape[-1])
        valid = torch.ones(rows.shape, dtype=torch.bool)
        powers = yield from exponentials(ctx, Shared(rows, x.frac), valid, shift)
        spec = inverse(x.shape[-1], shift)
        row, factor = yield from together(
            open_row(ctx, powers, EXP_FRAC, spec), row_factor(ctx, powers.sum(-1), spec)
        )
        share = yield from scale_rows(ctx, row, EXP_FRAC, factor, spec)
        return Shared(share.reshape(x.shape), SCALED_FRAC)

    @classmethod
    def stock(cls, x: Any, shift: str = PAIRS) -> Any:
        """CrypTen's softmax: maximum by comparisons, exponential, reciprocal."""
        return x.softmax(-1)


def too_far_apart(measured: Mapping[str, Any]) -> str:
    """Why `exponentials` cannot run on rows of scores as calibration found them, if it cannot."""
    spread = measured.get("score_spread", 0.0)
    if spread <= MAX_SPREAD:
        return ""
    return (
        f"the scores of a row are {spread:.3g} apart in calibration; its protocol supports up to "
        f"{MAX_SPREAD:g}"
    )
