"""Attention whose softmax is replaced by a ratio of squares or of rectified scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mergec.runtime.core.cases import PUBLIC, Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import FRACTIONAL_BITS, RANGE_MARGIN_BITS, Cost
from mergec.runtime.core.values import Masked, Shared, encode
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.ops.attention import (
    ScoredAttention,
    biased,
    counted_scores,
    largest_before_cap,
    plain_weighted_sum,
    result_shape,
    sample_operands,
    scored,
    scores,
    scores_cost,
    scores_frac,
    small_operands,
    split_mask,
    stock_scores,
    stock_weighted_sum,
    weighted_sum,
    weighted_sum_cost,
)
from mergec.runtime.protocols.normalize import (
    SCALED_FRAC,
    row_factor,
    row_factor_cost,
    scale_rows,
    scale_rows_cost,
)
from mergec.runtime.protocols.octave import MAX_EXPONENT
from mergec.runtime.protocols.power import Power
from mergec.runtime.protocols.rectify import rectify, rectify_cost
from mergec.runtime.protocols.rows import MAX_ROW
from mergec.runtime.protocols.squares import truncated_square, truncated_square_cost
from mergec.runtime.protocols.truncate import cut, truncate, truncate_cost

OFFSET = 5.0
"""c of (x + c)**2, as in MPCFormer."""

EPSILON = 2.0**-6
"""Added to every weight that counts, so that no row sums to zero."""

KINDS = ("2quad", "2relu")
DEFAULT_BOUND = 64.0
LARGEST_BOUND = {"2quad": 2.0**10, "2relu": 2.0**14}
"""Larger scores do not fit into the ring: the upper limit of `bound`."""

_ROW_BITS = MAX_ROW.bit_length() - 1
_SUM_BITS = 36
"""Sums of opened weights stay below 2**36, which leaves values 2**10 of room in the ring."""


@dataclass(frozen=True)
class _Scales:
    """Fractional bits of a row's weights, all derived from public numbers.

    Rows are counted as if they had 4096 entries: a row of n is multiplied by the power of two that
    brings n to (2048, 4096]. So the row's sum is its mean weight, at 12 bits more.
    """

    kind: str
    bound: float

    @property
    def top(self) -> int:
        """log2 of the largest weight."""
        power_of_score = 2 if self.kind == "2quad" else 1
        return math.ceil(power_of_score * math.log2(self.bound or DEFAULT_BOUND))

    @property
    def score_frac(self) -> int:
        """Bits of a score before it becomes a weight."""
        room = (MAX_EXPONENT - _ROW_BITS - self.top) // 2
        return min(room, FRACTIONAL_BITS) if self.kind == "2quad" else FRACTIONAL_BITS

    @property
    def weight_frac(self) -> int:
        """Bits of a weight."""
        return 2 * self.score_frac if self.kind == "2quad" else self.score_frac

    @property
    def opened_frac(self) -> int:
        """Bits of a weight when it is multiplied with a value."""
        return min(self.weight_frac, _SUM_BITS - _ROW_BITS - self.top)

    @property
    def inverse(self) -> Power:
        """1 / (mean weight of a row), which is at least EPSILON / 2 and at most 2**top."""
        frac = self.weight_frac + _ROW_BITS
        low = frac + int(math.log2(EPSILON)) - 2
        return Power(-1.0, frac, low, frac + self.top)


class RatioAttention(ScoredAttention):
    """w v / sum(w), with w = (s + 5)**2 or max(s, 0) of the scores s: see `ScoredAttention`.

    Masked entries have the weight 0. Every entry that the mask lets count has 2**-6 more weight, so
    that the sum is never zero: where all weights vanish, the row is their plain mean.

    kind: "2quad", (x + c)**2 / sum with c = 5, the 2Quad of MPCFormer (Li et al., ICLR 2023,
    section 3.2); "2relu", relu(x) / sum, after Mohassel and Zhang (SecureML, IEEE S&P 2017). bound:
    a power of two that |s + 5| or |s| stays below, from calibration. bias: is added to the scores,
    as in `attention`; it takes no message.

    Error below 1e-3 for values of size 1. Bytes: `cost`. Each party sees what it sees in
    `truncate`, `rectify`, `row_factor` and `weighted_sum`.
    """

    name = "ratio_attention"
    schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap, str kind, "
        "float bound=0.0, Tensor? bias=None) -> Tensor"
    )
    operands = {**ScoredAttention.operands, "bias": "fixed"}

    @staticmethod
    def reference(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float,
        kind: str,
        bound: float = 0.0,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        base, valid = _base_scores(kind, q, k, mask, bias, scale, softcap)
        weights = base.square() if kind == "2quad" else base.relu()
        weights = (weights + EPSILON) * valid
        weights = weights / weights.sum(-1, keepdim=True)
        return plain_weighted_sum(weights, v)

    @staticmethod
    def cases() -> list[Case]:
        make, few = Sampler(), small_operands()
        mask = {"mask": PUBLIC}
        return [
            *(Case([*args, k], 1e-3, forms=mask) for k in KINDS for args in sample_operands(make)),
            # Weights near 100 times the reciprocal of their sum, which has 16 bits.
            Case([*few, 0.5, 0.0, "2quad"], stock=3e-2, forms=mask),
            Case([*few[:3], None, 0.5, 0.0, "2relu"], stock=3e-2),
            *_biased_cases(make),
            *(Case(_with_narrow_values(make, kind), 1e-3, forms=mask) for kind in KINDS),
        ]

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        base, _ = _base_scores(arguments["kind"], *scored(arguments))
        return {"largest_score": float(base.abs().max()), **largest_before_cap(arguments)}

    @classmethod
    def calibrate(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """How large scores get: a power of two, so that it says little about the weights."""
        bound, limit = _bound(measured), LARGEST_BOUND[arguments["kind"]]
        return {"bound": min(bound, limit)} if bound else {}

    @classmethod
    def refusal(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        kind = arguments["kind"]
        if _bound(measured) <= LARGEST_BOUND[kind]:
            return super().refusal(measured, arguments)
        return (
            f"its scores reach {measured['largest_score']:.3g} in calibration, and beyond that may "
            f"grow by 2**{RANGE_MARGIN_BITS}; {kind} supports them up to {LARGEST_BOUND[kind]:g}"
        )

    @classmethod
    def cost(
        cls,
        q: Masked,
        k: Masked,
        v: Masked,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float,
        kind: str,
        bound: float = 0.0,
        bias: Any = None,
        *,
        fixed: int,
    ) -> Cost:
        scales = _Scales(kind, bound)
        rows, features = math.prod(q.shape[:-1]), v.shape[-1]
        count = int(split_mask(mask, q, k)[0].sum())
        frac = fixed if softcap else scores_frac(q, k, scale)
        total = scores_cost(q, k, scale, softcap)
        if kind == "2quad":
            total += truncated_square_cost(count)
        else:
            total += truncate_cost(count, frac - scales.score_frac) + rectify_cost(count)
        values = truncate_cost(count, scales.weight_frac - scales.opened_frac)
        values += weighted_sum_cost(rows, v)
        total += values.beside(row_factor_cost(scales.inverse, rows))
        frac = scales.opened_frac + _ROW_BITS + v.frac
        return total + scale_rows_cost(frac, scales.inverse, rows, features)

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        q: Masked,
        k: Masked,
        v: Masked,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float,
        kind: str,
        bound: float = 0.0,
        bias: torch.Tensor | None = None,
    ) -> Protocol:
        """Scores as in `attention`; then weights, their sum's inverse and the weighted sum.

        2quad: the square comes from the opening that truncates the score, 1 round; 2relu: one
        truncation and `rectify`, 3 rounds. The reciprocal is computed in the same rounds as the
        weighted sum, which is multiplied by it in the end. There is no maximum and no exponential.
        Which entries the mask hides is public: no protocol runs on them.
        """
        scales = _Scales(kind, bound)
        found = yield from scores(ctx, q, k, scale, softcap)
        found = biased(ctx, found, bias, q, k)
        valid, shown = split_mask(mask, q, k)
        rows = _Rows(valid)
        share = rows.take(found.share)
        added = torch.zeros(rows.count, dtype=torch.float64)
        if shown is not None:
            added += shown[valid]
        if kind == "2quad":
            added += OFFSET
        if not share.is_meta:
            words = to_device(encode(added, found.frac), share.device, "public")
            share = share + ctx.public(words)
        if kind == "2quad":
            share = yield from truncated_square(ctx, share, found.frac - scales.score_frac)
        else:
            share = yield from truncate(ctx, share, found.frac - scales.score_frac)
            share = yield from rectify(ctx, cut(ctx, share, 0))
        if not share.is_meta:
            epsilon = torch.full((), round(EPSILON * 2.0**scales.weight_frac), device=share.device)
            share = share + ctx.public(epsilon)
        weights = rows.put(share)
        reciprocal, row = yield from together(
            row_factor(ctx, weights.sum(-1), scales.inverse),
            _weighted_sum(ctx, rows, share, v, scales),
        )
        frac = scales.opened_frac + _ROW_BITS + v.frac
        result = yield from scale_rows(ctx, row, frac, reciprocal, scales.inverse)
        return Shared(result.reshape(result_shape(q, v)), SCALED_FRAC)

    @classmethod
    def stock(
        cls,
        q: Any,
        k: Any,
        v: Any,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float,
        kind: str,
        bound: float = 0.0,
        bias: torch.Tensor | None = None,
    ) -> Any:
        """CrypTen's products, square or comparison, and reciprocal of the row's mean weight."""
        from mergec.runtime.crypten import compat as crypten

        found = stock_scores(q, k, scale, softcap)
        flat, shown = split_mask(mask, q, k)
        valid = flat.reshape(found.shape).to(torch.float32)
        if shown is not None:
            found = found + shown.reshape(found.shape).to(torch.float32)
        if bias is not None:
            found = found + bias
        weights = (found + OFFSET).square() if kind == "2quad" else found.relu()
        # Divided by the number of entries, so that the sum stays where the reciprocal converges.
        weights = (weights + EPSILON) * (valid / valid.sum(-1, keepdim=True))
        with crypten.cfg.temp_override({"functions.reciprocal_all_pos": True}):
            inverse = weights.sum(-1, keepdim=True).reciprocal()
        return stock_weighted_sum(weights * inverse, v)


def _with_narrow_values(make: Sampler, kind: str) -> list[Any]:
    (q, k, _, mask, scale, softcap), *_ = sample_operands(make)
    return [q, k, make.normal(1, 2, 9, 10), mask, scale, softcap, kind]


def _biased_cases(make: Sampler) -> list[Case]:
    """A bias that the server holds, with a causal mask; a shared one, for all rows of a head."""
    (q, k, v, mask, scale, _), *_ = sample_operands(make)
    bias, few = make.normal(1, 6, 4, 9, scale=3), small_operands()
    held = {"mask": PUBLIC, "bias": "held"}
    row = bias[:, :, :1]
    return [
        *(Case([q, k, v, mask, scale, 0.0, kind, 0.0, bias], 1e-3, forms=held) for kind in KINDS),
        *(Case([q, k, v, None, scale, 0.0, kind, 0.0, row], 1e-3) for kind in KINDS),
        Case([*few, 0.5, 0.0, "2quad", 0.0, make.small(1, 4, 3, 5)], stock=3e-2, forms=held),
    ]


def _bound(measured: Mapping[str, Any]) -> float:
    """The power of two that scores stay below, with a margin; 0 if none were measured."""
    largest = measured.get("largest_score", 0.0)
    if not largest:
        return 0.0
    return float(2.0 ** max(0, math.ceil(math.log2(largest) + RANGE_MARGIN_BITS)))


def _base_scores(kind: str, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What is squared or rectified, in the clear, zero where masked; and which entries count.

    call: as for `counted_scores`.
    """
    found, valid = counted_scores(*call)
    if kind == "2quad":
        found = found + OFFSET
    return found.where(valid, 0.0), valid


class _Rows:
    """The entries of rows [R, L] that count, as a flat tensor and back."""

    def __init__(self, valid: torch.Tensor) -> None:
        self.valid = valid
        self.places = valid.reshape(-1).nonzero()[:, 0]
        self.count = len(self.places)
        # A row of n entries times 2**(12 - ceil(log2 n)).
        bits = torch.ceil(torch.log2(valid.sum(-1, keepdim=True).to(torch.float64)))
        self.factor = 1 << (_ROW_BITS - bits.to(torch.int64))

    def take(self, share: torch.Tensor) -> torch.Tensor:
        if share.is_meta:
            return ghost((self.count,))
        return share.reshape(-1)[to_device(self.places, share.device, "public")]

    def put(self, share: torch.Tensor) -> torch.Tensor:
        """Rows as if they had 4096 entries, zero where nothing counts."""
        if share.is_meta:
            return ghost(self.valid.shape)
        result = torch.zeros(self.valid.shape, dtype=torch.int64, device=share.device)
        result.view(-1)[to_device(self.places, share.device, "public")] = share
        return result * to_device(self.factor, share.device, "public")


def _weighted_sum(
    ctx: Context, rows: _Rows, share: torch.Tensor, values: Masked, scales: _Scales
) -> Protocol:
    share = yield from truncate(ctx, share, scales.weight_frac - scales.opened_frac)
    weights = Shared(rows.put(share), scales.opened_frac + _ROW_BITS)
    row = yield from weighted_sum(ctx, weights, values, scales.inverse)
    return row
