"""Exponentials of rows of scores, shifted by the row's maximum: the first half of a softmax."""

from __future__ import annotations

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.ops.exp import EXP
from runtime.protocols.compare import maximum, maximum_cost, take_window
from runtime.protocols.power import Power
from runtime.protocols.saturate import apply, apply_cost
from runtime.spec import FRACTIONAL_BITS, Cost
from runtime.values import Shared

EXP_FRAC = 17
"""Fractional bits of an exponential: a row of 4096 ones stays below 2**30."""

MAX_ROW = 4096
"""Longest row of scores."""

INVERSE = Power(-1.0, EXP_FRAC, EXP_FRAC - 1, 29)
"""1 / (sum of a row's exponentials), which is at least 1 and at most 4096."""


def exponentials(ctx: Context, scores: Shared, valid: torch.Tensor) -> Protocol:
    """Shares of exp(x - max(row)) with 17 fractional bits; zero where `valid` is not set.

    In: Shared [R, L], L <= 4096, valid entries in [-1.4e4, 1.4e4]; public bool [R, L] with an
    entry in each row. Rounds 2 ceil(log2 L) + 3. Scores are taken modulo 2**32 with 16 fractional
    bits (`take_window`), where differences up to 2**15 fit. Each party sees what it sees in
    `maximum` and `saturate.apply`.
    """
    drop = scores.frac - FRACTIONAL_BITS
    narrow = take_window(scores.share, drop)
    peak = yield from maximum(ctx, narrow, valid)
    count = int(valid.sum())
    if narrow.is_meta:
        yield from apply(ctx, EXP, torch.empty(count, dtype=torch.int32, device="meta"), EXP_FRAC)
        return torch.empty(scores.shape, dtype=torch.int64, device="meta")
    where = valid.to(narrow.device)
    powers = yield from apply(ctx, EXP, (narrow - peak[:, None])[where], EXP_FRAC)
    result = torch.zeros(scores.shape, dtype=torch.int64, device=narrow.device)
    result[where] = powers
    return result


def exponentials_cost(valid: torch.Tensor) -> Cost:
    """Cost of `exponentials` for rows with these valid entries."""
    return maximum_cost(valid) + apply_cost(EXP, int(valid.sum()), EXP_FRAC)
