"""Grouped-query attention as one op: scores, softmax and the weighted sum of the values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.cases import PUBLIC, Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.op import LAST, Kind, Op
from mergec.runtime.core.spec import FRACTIONAL_BITS, RANGE_MARGIN_BITS, WINDOW_FRAC, Cost
from mergec.runtime.core.values import Held, Masked, Shared, encode
from mergec.runtime.crypten.domain import MASKED_OUT
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device, to_host
from mergec.runtime.ops.softmax import too_far_apart
from mergec.runtime.protocols.finer import FINER_BITS, finer_products, finer_products_cost
from mergec.runtime.protocols.local import as_share
from mergec.runtime.protocols.multiply import matmul_of_masked
from mergec.runtime.protocols.normalize import (
    SCALED_FRAC,
    open_row,
    open_row_cost,
    row_factor,
    row_factor_cost,
    scale_rows,
    scale_rows_cost,
)
from mergec.runtime.protocols.opening import open_masked, open_masked_cost
from mergec.runtime.protocols.power import Power
from mergec.runtime.protocols.probabilities import (
    ByLogarithm,
    probabilities,
    probabilities_cost,
)
from mergec.runtime.protocols.rows import (
    BROAD,
    COARSE_REACH,
    EXP_FRAC,
    HISTOGRAM,
    LOG,
    MAX_ROW,
    PAIRS,
    SHIFTS,
    SLOTS,
    coarse_rows,
    exponentials,
    exponentials_cost,
    hiding,
    inverse,
    logarithm_called,
    reach_of_rows,
    shift_of_length,
    shift_of_many,
    shift_supplies,
    shift_variants,
)
from mergec.runtime.protocols.saturate import (
    SCALAR_DOMAIN,
    Function,
    Tail,
    apply,
    apply_cost,
    function_input,
    saturating,
)
from mergec.runtime.protocols.truncate import truncate, truncate_cost

_LARGEST_VALUE = 2.0**23 / MAX_ROW
"""Values up to this can be weighed in the longest row, whichever way the row is shifted."""

MASKED_SCORE = -1e4
"""A mask entry at or below this value hides the position."""


class ScoredAttention(Op, abstract=True):
    """What attentions share that compute scores, cap(scale * q k^T) + mask, from opened operands.

    q [B, H, N, D], k [B, G, L, D] and v [B, G, L, E] with H a multiple of G, opened to both under
    masks, and a public mask that broadcasts to [B, H, N, L]. An entry of the mask of -1e4 or below
    hides the position; any other is added to the score. With `softcap` c > 0 the scaled scores
    become c tanh(scores / c) before the mask (gemma2). The result [B, H, N, E] is shared, with 32
    fractional bits.

    The parameters of a subclass are q, k, v, mask, scale, and softcap. Its protocol supports only a
    scale that is a power of two: the compiler moves any other into the queries.
    """

    operands = {"q": "masked", "k": "masked", "v": "masked"}
    kind = Kind.ATTENTION
    parts = ("q", "k", "v", "mask")

    @classmethod
    def scale(cls, *args: Any, fixed: int) -> int:
        return SCALED_FRAC

    @classmethod
    def last_position(cls, dim: int) -> dict[str, Any] | None:
        """One query looks at all keys and values, by its row of the mask."""
        rows = dict.fromkeys(("q", "mask", "bias", "sink"), LAST)
        return rows if dim == -2 else None

    @classmethod
    def inexact(cls, arguments: Mapping[str, Any]) -> str:
        # The table of a cap is so wide that the cubics of its windows are 2**-14 apart.
        return "it caps its scores; a cap has no exact rounding" if arguments["softcap"] else ""

    @classmethod
    def refusal(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        uncapped = measured.get("uncapped_score", 0.0)
        if uncapped * 2.0**RANGE_MARGIN_BITS > SCALAR_DOMAIN[1]:
            return (
                f"its scores reach {uncapped:.3g} in calibration, and beyond that may grow by "
                f"{2**RANGE_MARGIN_BITS}; the cap's protocol supports them up to "
                f"{SCALAR_DOMAIN[1]:g}"
            )
        return too_far_apart(measured)


class Attention(ScoredAttention):
    """softmax(cap(scale * q k^T) + mask + bias) v, with grouped queries: see `ScoredAttention`.

    bias: what is added to the scores and is not public, such as the relative position bias of T5:
    known to the server, or shared. It broadcasts to [B, H, N, L], and takes no message.

    sink: one more score of each row, which has no value and which no mask hides (gpt_oss,
    granite_swa, flint): the server's, shared or public. It broadcasts to [B, H, N, 1]. Who holds it
    appends it to its own share of the scores, so it takes no message of its own. Rounds and limits
    are those of a row that is longer by one, bytes less what its weight would take to be opened.

    pads: int64 [1], held by the client: so many keys, the first ones, get no weight. The client
    subtracts `rows.hiding` from its own share of their scores, so this takes no message, and shapes
    and messages are those of any other number. Scores must be at most half as far apart for it. A
    row in which every key is hidden attends to them as if none was, or with a sink, to nothing.

    Error below 3e-4 for values of size 1, and rows of up to 4096 scores that are up to 3.2e4 apart.
    Rounds 4, or 3 with broad windows, and 3 for each level of `peak`, 4 for `crest`, 2 for slots,
    or 3 for slots by digits; by logarithms 4 in all. Two more for a cap, and one if the scale is so
    small that the scores have to be truncated. Bytes: `cost`. What each party sees is what it sees
    in `exponentials`, `open_masked`, `open_row` and `row_factor`; by logarithms, in `probabilities`
    and `finer_products`.

    shift: how the number near the maximum is found that rows of scores are shifted by, one of
    `rows.SHIFTS`, `rows.SLOTS` or `rows.BROAD`; or one of `rows.LOG`, with which rows are divided
    by their sum before values are weighed, and nothing is scaled after. A step of more than 8
    tokens takes another one, where bytes count more (`rows.shift_of_many`). With exact rounding
    rows are compared by pairs. By pairs, a row of L entries takes values up to
    2**(26 - log2 L); otherwise, up to 2**(23 - log2 L). reach: with n for it, calibration says that
    the scores of a row are at most 2**n - 4 apart, so that the shift may be found by slots, and
    broad windows may serve the exponentials, in a round less. By logarithms rows may be 2**n - 10
    apart. coarse: with n for it, slots may be coarse for rows of up to 2**n entries, where scores
    are 2**reach - 8 apart at most; longer rows take finer slots.
    """

    name = "attention"
    schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap=0.0, "
        "str shift='pairs', Tensor? bias=None, int reach=0, Tensor? pads=None, Tensor? sink=None, "
        "int coarse=0) -> Tensor"
    )
    operands = {**ScoredAttention.operands, "bias": "fixed", "pads": "held", "sink": "fixed"}

    @staticmethod
    def reference(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float = 0.0,
        shift: str = PAIRS,
        bias: torch.Tensor | None = None,
        reach: int = 0,
        pads: torch.Tensor | None = None,
        sink: torch.Tensor | None = None,
        coarse: int = 0,
    ) -> torch.Tensor:
        weights = Attention.probabilities(
            q, k, mask, scale, softcap, shift, bias, reach, pads, sink
        )
        return plain_weighted_sum(weights, v)

    @staticmethod
    def cases() -> list[Case]:
        make, few = Sampler(), small_operands()
        one = tuple(x[:, :, :1] for x in few[:3])
        return [
            *(Case(args, 3e-4, forms={"mask": PUBLIC}) for args in sample_operands(make)),
            Case([*_longer_operands(make), 0.0, HISTOGRAM], 3e-4, forms={"mask": PUBLIC}),
            Case([*_longer_operands(make), 20.0, HISTOGRAM], 3e-4, forms={"mask": PUBLIC}),
            *_biased_cases(make),
            *_padded_cases(make),
            *_narrow_cases(make),
            *(
                Case([*_longer_operands(make), 0.0, way], 3e-4, forms={"mask": PUBLIC})
                for way in (*SHIFTS, *SLOTS, *BROAD, *LOG)
                if way not in (PAIRS, HISTOGRAM)
            ),
            *_coarse_cases(make),
            Case([*few[:3], None, 0.5], stock=1e-2),
            Case([*few, 0.3, 2.0], stock=1e-2, forms={"mask": PUBLIC}),
            Case([*one, None, 0.5], stock=1e-2),
            *_sink_cases(make),
        ]

    @staticmethod
    def probabilities(
        q: torch.Tensor,
        k: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float = 0.0,
        shift: str = PAIRS,
        bias: torch.Tensor | None = None,
        reach: int = 0,
        pads: torch.Tensor | None = None,
        sink: torch.Tensor | None = None,
        coarse: int = 0,
    ) -> torch.Tensor:
        """How much each token attends to each other one, [B, H, N, L], in the clear."""
        scores = plain_scores(q, k, scale, softcap)
        hidden = None if pads is None else _hidden(pads, k.shape[-2], reach).to(scores)
        for term in (mask, bias, hidden):
            scores = scores if term is None else scores + term
        if sink is None:
            return torch.softmax(scores, -1)
        own = sink.to(scores).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, own], -1), -1)[..., :-1]

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        # Hidden scores count: `hiding` is about all scores of a row before some are hidden.
        found, valid = counted_scores(*scored(arguments))
        highest = found.where(valid, -math.inf).amax(-1)
        lowest = found.where(valid, math.inf).amin(-1)
        if (sink := arguments["sink"]) is not None:
            own = sink.to(found).squeeze(-1)
            highest, lowest = torch.maximum(highest, own), torch.minimum(lowest, own)
        return {
            "score_spread": float((highest - lowest).max()),
            "largest_value": float(arguments["v"].abs().max()),
            **largest_before_cap(arguments),
        }

    @classmethod
    def calibrate(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        spread, hides = measured.get("score_spread", math.inf), arguments.get("pads") is not None
        reach = reach_of_rows(spread, hides)
        fits = reach and not hides and spread * 2.0**RANGE_MARGIN_BITS <= 2.0**reach - COARSE_REACH
        coarse = coarse_rows(measured.get("largest_value", math.inf)) if fits else 0
        return {"reach": reach, "coarse": coarse}

    @classmethod
    def refusal(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        largest = measured.get("largest_value", 0.0)
        spread, limit = measured.get("score_spread", 0.0), hiding(0)[1]
        if arguments.get("pads") is not None and spread > limit:
            return (
                f"the scores of a row are {spread:.3g} apart in calibration; with pad_prompt its "
                f"protocol supports up to {limit:g}"
            )
        if largest * 2.0**RANGE_MARGIN_BITS <= _LARGEST_VALUE:
            return super().refusal(measured, arguments)
        return (
            f"its values reach {largest:.3g} in calibration, and beyond that may grow by "
            f"{2**RANGE_MARGIN_BITS}; the protocol weighs values up to {_LARGEST_VALUE:g}"
        )

    @classmethod
    def variants(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """Histograms take fewer rounds, pairs fewer dealt bytes; slots the fewest of both.

        With digits, slots take one round more and fewer bytes still; with keys, tables of slots
        take fewer bytes on the server's link and some on the client's.
        """
        return shift_variants(arguments["reach"], bool(arguments["coarse"]))

    @classmethod
    def far_variants(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """Logarithms take a round less than slots, and one more product with the values."""
        reach, pads = arguments["reach"], arguments["pads"]
        return ({"shift": f"log-{reach}"},) if reach and pads is None else ()

    @classmethod
    def supplies(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        return shift_supplies(arguments["shift"])

    @classmethod
    def cost(
        cls,
        q: Masked,
        k: Masked,
        v: Masked,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float = 0.0,
        shift: str = PAIRS,
        bias: Any = None,
        reach: int = 0,
        pads: Any = None,
        sink: Any = None,
        coarse: int = 0,
        *,
        fixed: int,
    ) -> Cost:
        rows = math.prod(q.shape[:-1])
        features = v.shape[-1]
        valid, _ = split_mask(mask, q, k)
        valid = _with_sink(valid, sink)
        way, logarithm = _way(q, valid, shift, pads, coarse)
        total = scores_cost(q, k, scale, softcap)
        if logarithm is not None:
            total += probabilities_cost(valid, logarithm, _weight_frac(v))
            return total + finer_products_cost(rows, v)
        total += exponentials_cost(valid, way)
        values = weighted_sum_cost(rows, v)
        spec = inverse(valid.shape[-1], way)
        total += values.beside(row_factor_cost(spec, rows))
        return total + scale_rows_cost(EXP_FRAC + v.frac, spec, rows, features)

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        q: Masked,
        k: Masked,
        v: Masked,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float = 0.0,
        shift: str = PAIRS,
        bias: Any = None,
        reach: int = 0,
        pads: Any = None,
        sink: Any = None,
        coarse: int = 0,
    ) -> Protocol:
        """Attention on opened queries, keys and values; scale must be a power of two.

        Scores and weighted sums need no message of their own: both factors are open under masks.
        The division by the sum of exponentials follows the weighted sum, on D instead of L elements
        of a row. Its reciprocal is computed in the same rounds as the weighted sum. A sink is a
        column of scores without a value: its exponential counts in this sum alone.
        """
        length = k.shape[-2]
        found = yield from scores(ctx, q, k, scale, softcap)
        valid, added = split_mask(mask, q, k)
        if added is not None and not found.share.is_meta:
            words = to_device(encode(added, found.frac), found.share.device, "public")
            found.share = found.share + ctx.public(words)
        found = biased(ctx, found, bias, q, k)
        if pads is not None:
            hidden = Held(pads.vis, _hidden(pads.value, length, reach))
            found = biased(ctx, found, hidden, q, k)
        if sink is not None:
            found, valid = _with_column(ctx, found, sink, q), _with_sink(valid, sink)
        way, logarithm = _way(q, valid, shift, pads, coarse)
        if logarithm is not None and not ctx.exact:
            weights = yield from probabilities(ctx, found, valid, logarithm, _weight_frac(v))
            weights = weights[:, :length]
            folded = weights.reshape(*v.shape[:2], -1, length, weights.shape[-1])
            share = yield from finer_products(ctx, folded, v)
            return Shared(share.reshape(result_shape(q, v)), SCALED_FRAC)
        way = LOG.get(way, way)
        powers = yield from exponentials(ctx, found, valid, way)
        spec = inverse(valid.shape[-1], way)
        total = ghost((len(powers),)) if powers.is_meta else powers.sum(-1)
        row, factor = yield from together(
            weighted_sum(ctx, Shared(powers[:, :length], EXP_FRAC), v, spec),
            row_factor(ctx, total, spec),
        )
        result = yield from scale_rows(ctx, row, EXP_FRAC + v.frac, factor, spec)
        return Shared(result.reshape(result_shape(q, v)), SCALED_FRAC)

    @classmethod
    def stock(
        cls,
        q: Any,
        k: Any,
        v: Any,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float = 0.0,
        shift: str = PAIRS,
        bias: Any = None,
        reach: int = 0,
        pads: Any = None,
        sink: Any = None,
        coarse: int = 0,
    ) -> Any:
        """CrypTen's matrix products and softmax. Raises NotImplementedError for hidden keys."""
        if pads is not None:
            raise NotImplementedError("CrypTen's exponential is none of scores as low as that")
        scores = stock_scores(q, k, scale, softcap)
        if mask is not None:
            # CrypTen's exponential is zero from -100 to -400, and explodes beyond -512.
            scores = scores + mask.to(torch.float32).clamp(min=-MASKED_OUT).to(scores.device)
        if bias is not None:
            scores = scores + bias
        if sink is None:
            return stock_weighted_sum(scores.softmax(-1), v)
        from mergec.runtime.crypten import compat as crypten

        zeros = scores[..., :1] - scores[..., :1]
        weights = crypten.cat([scores, zeros + sink], dim=-1).softmax(-1)
        return stock_weighted_sum(weights[..., :-1], v)


def result_shape(q: Masked, v: Masked) -> tuple[int, ...]:
    """One row of a value's size for each query."""
    return (*q.shape[:-1], v.shape[-1])


_MOST_NEW = 8
"""Tokens of a step up to which its rows are shifted in the way that was chosen for few."""


def _way(
    q: Masked, valid: torch.Tensor, shift: str, pads: Any, coarse: int
) -> tuple[str, ByLogarithm | None]:
    """How a step weighs rows [R, L] of scores for these queries: a shift, or a logarithm."""
    length = valid.shape[-1]
    if q.shape[-2] > _MOST_NEW:
        name = shift_of_many(shift, length, coarse)
    else:
        name = shift_of_length(shift, length, coarse)
    return logarithm_called(name, length, pads is not None)


def _with_column(ctx: Context, found: Shared, sink: Any, q: Masked) -> Shared:
    """Shared scores [B H N, L] with a sink that broadcasts to [B, H, N, 1] behind them. Local."""
    rows = len(found.share)
    if found.share.is_meta:
        own = ghost((rows, 1))
    else:
        own = as_share(ctx, sink, found.frac).expand(*q.shape[:-1], 1).reshape(rows, 1)
    return Shared(torch.cat([found.share, own], -1), found.frac)


def _with_sink(valid: torch.Tensor, sink: Any) -> torch.Tensor:
    """Which scores of rows count, with the sink's behind them, if there is one."""
    return valid if sink is None else torch.cat([valid, valid.new_ones(len(valid), 1)], -1)


def _weight_frac(v: Masked) -> int:
    """Fractional bits of weights whose products with values are not scaled any more."""
    return SCALED_FRAC + FINER_BITS - v.frac


def sample_operands(make: Sampler) -> list[list[Any]]:
    """q, k, v, mask, scale and softcap of calls for `Op.cases`: causal, ALiBi, no mask, capped."""
    mask = torch.full((1, 1, 4, 9), torch.finfo(torch.float32).min).triu(6)
    alibi = mask + make.normal(1, 6, 1, 9).float()
    return [
        [
            make.normal(1, 6, 4, 16, scale=3),
            make.normal(1, groups, 9, 16),
            make.normal(1, groups, 9, 16),
            added,
            0.25,
            softcap,
        ]
        for groups, added, softcap in (
            (2, mask, 0.0),
            (6, alibi, 0.0),
            (1, None, 0.0),
            (2, mask, 20.0),
        )
    ]


def _longer_operands(make: Sampler) -> list[Any]:
    """The same with 24, 40, 41 and 48 scores in a row: as many as histograms are for, and fewer."""
    mask = torch.zeros(1, 1, 4, 48)
    for row, length in enumerate((24, 40, 41, 48)):
        mask[..., row, length:] = -3.4e38
    keys, values = make.normal(1, 2, 48, 16), make.normal(1, 2, 48, 16)
    return [make.normal(1, 4, 4, 16, scale=3), keys, values, mask, 0.25]


def _narrow_cases(make: Sampler) -> list[Case]:
    """Values that are shorter than keys, as in multi-head latent attention, and longer ones."""
    q, k, _, mask, scale = _longer_operands(make)
    return [
        Case(
            [q, k, make.normal(1, 2, 48, size), mask, scale, 0.0, way], 3e-4, forms={"mask": PUBLIC}
        )
        for way, size in ((PAIRS, 10), (HISTOGRAM, 24), ("log-8", 10))
    ]


def _biased_cases(make: Sampler) -> list[Case]:
    """A bias for each head that the server holds, with a causal mask and without one; shared."""
    (q, k, v, mask, scale, _), *_ = sample_operands(make)
    bias = make.normal(1, 6, 4, 9, scale=3)
    few, held = small_operands(), {"mask": PUBLIC, "bias": "held"}
    return [
        Case([q, k, v, mask, scale, 0.0, PAIRS, bias], 3e-4, forms=held),
        Case([q, k, v, None, scale, 0.0, HISTOGRAM, bias], 3e-4, forms={"bias": "held"}),
        Case([q, k, v, None, scale, 0.0, PAIRS, bias[:, :, :1]], 3e-4),
        Case([*few, 0.5, 0.0, PAIRS, make.small(1, 4, 3, 5)], stock=1e-2, forms=held),
    ]


def _padded_cases(make: Sampler) -> list[Case]:
    """Keys that the client hides, for every way to find the shift: none, some, and all that the
    first row sees; with a bias, a cap, few rows and many."""
    (q, k, v, mask, scale, _), *_ = sample_operands(make)
    q, bias = q / 4, make.normal(1, 6, 4, 9) / 4
    rest = [PAIRS, None, 0]
    long = _longer_operands(make)
    long[0] = long[0] / 8
    many = [make.normal(1, 2, 12, 8), make.normal(1, 1, 30, 8), make.normal(1, 1, 30, 8)]
    causal = torch.full((1, 1, 12, 30), torch.finfo(torch.float32).min).triu(19)
    ways = {name: int(name.split("-")[1]) for name in (*SLOTS, *BROAD)}

    def padded(operands: list[Any], pads: int, **held: str) -> Case:
        forms = {"mask": PUBLIC, **held}
        return Case([*operands, torch.tensor([pads])], 3e-4, forms=forms)

    return [
        *(padded([q, k, v, mask, scale, 0.0, *rest], pads) for pads in (0, 3, 5, 6, 7)),
        padded([q, k, v, mask, scale, 0.0, PAIRS, bias, 0], 4, bias="held"),
        padded([q, k, v, mask, scale, 20.0, *rest], 4),
        padded([q, k, v, None, scale, 0.0, *rest], 2),
        *(padded([*long, 0.0, way, None, 0], 17) for way in SHIFTS),
        *(padded([*long, 0.0, way, None, bits], 17) for way, bits in ways.items()),
        *(padded([*many, causal, 0.25, 0.0, f"broad-{n}", None, n], 9) for n in (6, 9)),
        padded([*many, causal, 0.25, 0.0, HISTOGRAM, None, 0], 9),
    ]


def _coarse_cases(make: Sampler) -> list[Case]:
    """Coarse slots, for rows as long as they serve and for one entry more, few rows and many."""
    many = [make.normal(1, 2, 12, 8), make.normal(1, 1, 32, 8), make.normal(1, 1, 32, 8)]
    causal = torch.full((1, 1, 12, 32), torch.finfo(torch.float32).min).triu(21)
    ways = {name: int(name.split("-")[1]) for name in BROAD if name.endswith("-coarse")}
    return [
        Case([*operands, 0.0, way, None, bits, None, None, coarse], 3e-4, forms={"mask": PUBLIC})
        for way, bits in ways.items()
        for operands, coarse in (
            (_longer_operands(make), 12),
            (_longer_operands(make), 5),
            ([*many, causal, 0.25], 5),
        )
    ]


def _sink_cases(make: Sampler) -> list[Case]:
    """A sink for each head that the server holds: among the scores, far above and far below them;
    for every way to weigh rows, few and many; with a bias, and with keys that the client hides, up
    to all of a row. Public, shared, and one for each token."""
    operands, sink, bias = sample_operands(make), make.normal(1, 6, 1, 1), make.normal(1, 6, 4, 9)
    long, other = _longer_operands(make), make.normal(1, 4, 1, 1, scale=3)
    many = [make.normal(1, 4, 12, 8), make.normal(1, 2, 30, 8), make.normal(1, 2, 30, 8)]
    causal = torch.full((1, 1, 12, 30), torch.finfo(torch.float32).min).triu(19)
    (q, k, v, mask, scale, _), *_ = operands
    alone = [q[:, :, :1], k[:, :, :1], v[:, :, :1], None, scale, 0.0]
    near = [q / 4, k, v, mask, scale, 0.0]
    reaches = {name: int(name.split("-")[1]) for name in (*SLOTS, *BROAD, *LOG)}

    def case(
        given: list[Any],
        own: torch.Tensor,
        way: str = PAIRS,
        added: torch.Tensor | None = None,
        pads: int | None = None,
        **forms: str,
    ) -> Case:
        hidden = None if pads is None else torch.tensor([pads])
        rest = [way, added, reaches.get(way, 0), hidden, own]
        return Case([*given, *rest], 3e-4, forms={"mask": PUBLIC, "sink": "held", **forms})

    return [
        *(case(each, sink) for each in operands),
        *(case(operands[0], sink + far) for far in (30.0, -30.0)),
        case(alone, sink),
        *(case([*long, 0.0], other, way) for way in (*SHIFTS, *reaches)),
        *(case([*many, causal, 0.25, 0.0], other, way) for way in (PAIRS, "broad-6", "log-6")),
        case(operands[0], sink, added=bias, bias="held"),
        *(case(near, sink, way, pads=n) for n in (0, 3, 6, 9) for way in (PAIRS, "broad-7")),
        case(operands[0], sink, sink=PUBLIC),
        case(operands[0], sink, sink="fixed"),
        case(operands[0], make.normal(1, 6, 4, 1), sink="fixed"),
        Case(
            [*small_operands(), 0.5, 0.0, PAIRS, None, 0, None, make.small(1, 4, 1, 1)],
            stock=1e-2,
            forms={"mask": PUBLIC, "sink": "held"},
        ),
    ]


def small_operands() -> list[torch.Tensor]:
    """q, k, v and a causal mask that CrypTen's stock protocols support."""
    make, mask = Sampler(), torch.zeros(1, 1, 3, 5)
    mask[..., 0, 3:] = mask[..., 1, 4:] = -3.4e38
    return [make.small(1, 4, 3, 4), make.small(1, 2, 5, 4), make.small(1, 2, 5, 4), mask]


def plain_scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    """cap(scale * q k^T) in the clear, [B, H, N, L], with queries grouped as in `Attention`."""
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    found = torch.matmul(q, k.transpose(-1, -2)) * scale
    return softcap * torch.tanh(found / softcap) if softcap > 0 else found


def counted_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in the clear, with what mask and bias add to them, and which of them count."""
    found = plain_scores(q, k, scale, softcap)
    valid = torch.ones_like(found, dtype=torch.bool)
    if mask is not None:
        valid = (mask > MASKED_SCORE).expand_as(found)
        found = found + mask.expand_as(found).where(valid, 0.0)
    return found if bias is None else found + bias, valid


def largest_before_cap(arguments: Mapping[str, Any]) -> dict[str, float]:
    """What `Op.measure` says of scores that are capped: how large they are before that."""
    if not arguments["softcap"]:
        return {}
    scores = plain_scores(arguments["q"], arguments["k"], arguments["scale"], 0.0)
    return {"uncapped_score": float(scores.abs().max())}


scored = itemgetter("q", "k", "mask", "bias", "scale", "softcap")
"""What `counted_scores` reads of a call's arguments."""


def plain_weighted_sum(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The sum of values [B, G, L, D] by weights [B, H, N, L], in the clear."""
    return torch.matmul(weights, v.repeat_interleave(weights.shape[-3] // v.shape[-3], -3))


def stock_scores(q: Any, k: Any, scale: float, softcap: float) -> Any:
    """Scores [B, H, N, L] of CrypTen tensors. The heads of a group are rows of one product."""
    batch, heads, new, features = q.shape
    groups, length = k.shape[1], k.shape[2]
    query = q.reshape(batch, groups, heads // groups * new, features)
    found = query.matmul(k.transpose(-1, -2)).mul(float(scale))
    if softcap > 0:
        found = found.mul(1 / softcap).tanh().mul(float(softcap))
    return found.reshape(batch, heads, new, length)


def stock_weighted_sum(weights: Any, v: Any) -> Any:
    """The sum of values [B, G, L, D] by weights [B, H, N, L], as CrypTen tensors."""
    batch, heads, new, length = weights.shape
    groups, features = v.shape[1], v.shape[-1]
    rows = weights.reshape(batch, groups, heads // groups * new, length)
    return rows.matmul(v).reshape(batch, heads, new, features)


def scores(ctx: Context, q: Masked, k: Masked, scale: float, softcap: float) -> Protocol:
    """Shared rows [B H N, L] of cap(scale q k^T): no message of their own but for the cap's."""
    batch, heads, new, features = q.shape
    groups, length = k.shape[1], k.shape[2]
    # Heads of a group are further rows of one product.
    folded = (batch, groups, heads // groups * new, features)
    query = Masked(q.opened.reshape(folded), q.mask.reshape(folded), q.frac)
    keys = Masked(k.opened.transpose(-1, -2), k.mask.transpose(-1, -2), k.frac)
    share = matmul_of_masked(ctx, query, keys).reshape(-1, length)
    natural, frac = _natural_frac(q, k, scale), scores_frac(q, k, scale)
    if natural != frac:
        share = yield from truncate(ctx, share, natural - frac)
    if softcap:
        narrow = function_input(ctx, Shared(share, frac))
        frac = ctx.fixed
        share = yield from apply(ctx, _cap(softcap), narrow, frac)
    return Shared(share, frac)


def biased(ctx: Context, found: Shared, bias: Any, q: Masked, k: Masked) -> Shared:
    """Shared scores [B H N, L] with a bias that broadcasts to [B, H, N, L], if there is one.

    No message: who holds the bias adds it to its own share.
    """
    if bias is None or found.share.is_meta:
        return found
    own = as_share(ctx, bias, found.frac).expand(*q.shape[:-1], k.shape[-2])
    return Shared(found.share + own.reshape(found.share.shape), found.frac)


def _hidden(pads: torch.Tensor, length: int, reach: int) -> torch.Tensor:
    """What is added to the scores of keys [length], so that the first `pads` of them are hidden."""
    places = torch.arange(length, device=pads.device)
    return (places < pads).to(torch.float64) * -hiding(reach)[0]


def _natural_frac(q: Masked, k: Masked, scale: float) -> int:
    """Fractional bits of scale q k^T as it is computed: a power of two moves the binary point."""
    return q.frac + k.frac - round(math.log2(scale))


def scores_frac(q: Masked, k: Masked, scale: float) -> int:
    """Fractional bits of `scores` without a cap: as many as protocols can take a window of.

    A scale far below 1 would leave too many of them above the window, a large one too few.
    """
    return min(max(_natural_frac(q, k, scale), FRACTIONAL_BITS), WINDOW_FRAC)


def scores_cost(q: Masked, k: Masked, scale: float, softcap: float) -> Cost:
    """Cost of `scores`."""
    count = math.prod(q.shape[:-1]) * k.shape[2]
    total = Cost(offline=8 * count)
    total += truncate_cost(count, _natural_frac(q, k, scale) - scores_frac(q, k, scale))
    if softcap:
        total += apply_cost(_cap(softcap), count)
    return total


def weighted_sum(ctx: Context, weights: Shared, values: Masked, spec: Power) -> Protocol:
    """The rows [B H N, D] of weights [B H N, L] times values, opened for `scale_rows` with `spec`.

    Their fractional bits are those of both factors. Rounds 2: the weights are opened under a mask,
    then the result.
    """
    batch, groups, length, features = values.shape
    folded = Shared(weights.share.reshape(batch, groups, -1, length), weights.frac)
    opened = yield from open_masked(ctx, folded)
    share = matmul_of_masked(ctx, opened, values).reshape(-1, features)
    row = yield from open_row(ctx, share, weights.frac + values.frac, spec)
    return row


def weighted_sum_cost(rows: int, values: Masked) -> Cost:
    """Cost of `weighted_sum` for that many rows of weights."""
    length, features = values.shape[-2:]
    return (
        open_masked_cost(rows * length)
        + Cost(offline=8 * rows * features)
        + open_row_cost(rows * features)
    )


def split_mask(
    mask: torch.Tensor | None, q: Any, k: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which scores count, bool [rows, L] on the CPU, and what is added to them, if anything."""
    batch, heads, new, _ = q.shape
    length = k.shape[2]
    if mask is None:
        return torch.ones((batch * heads * new, length), dtype=torch.bool), None
    mask = to_host(mask, "public")
    valid = mask > MASKED_SCORE
    bias = torch.where(valid, mask, 0.0)

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values.expand(batch, heads, new, length).reshape(-1, length)

    return rows(valid), rows(bias) if bool(bias.any()) else None


@cache
def _cap(softcap: float) -> Function:
    """softcap * tanh(x / softcap), on 256 windows that reach at least 8 softcap to either side."""
    step_bits = math.ceil(math.log2(softcap / 16)) + 16
    start = -128 * 2.0 ** (step_bits - 16)
    out_frac = 60 - math.ceil(math.log2(softcap))
    return saturating(
        lambda x: softcap * np.tanh(x / softcap),
        start,
        256,
        step_bits,
        out_frac,
        step_bits + 2,
        left=Tail(0, -softcap),
        right=Tail(0, softcap),
    )
