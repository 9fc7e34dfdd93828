"""Exponentials of score rows, shifted by about the row's maximum: the first half of a softmax."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import FRACTIONAL_BITS, Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.compare import take_window
from mergec.runtime.protocols.opening import Cut
from mergec.runtime.protocols.peak import entries_of, peak, peak_cost
from mergec.runtime.protocols.power import Power
from mergec.runtime.protocols.saturate import Tail, apply, apply_cost, saturating

EXP_FRAC = 17
"""Fractional bits of an exponential. The largest exponential of a row is at least 1 and below 8."""

MAX_ROW = 4096
"""Longest supported row of scores."""

MAX_SPREAD = 32_000.0
"""Largest difference between scores of a row; their absolute position does not matter."""

_EXP = saturating(np.exp, -13.75, 64, 14, 58, 16, left=Tail(0, 0.0), right=None)


@cache
def inverse(length: int) -> Power:
    """1 / (sum of a row's exponentials), where the sum is at least 1 and below 8 per entry."""
    high = EXP_FRAC + 2 + math.ceil(math.log2(length))
    return Power(-1.0, EXP_FRAC, EXP_FRAC - 1, high, FRACTIONAL_BITS)


def exponentials(ctx: Context, scores: Shared, valid: torch.Tensor) -> Protocol:
    """Shares of exp(x - c) with 17 fractional bits, c in (max - 2, max] of the row's valid entries.

    In: Shared [R, L], L <= 4096, whose valid entries differ by at most 3.2e4 within a row; `valid`,
    public bool [R, L] with at least one True per row. Out: [R, L], zero where `valid` is False.
    Scores have at most 48 fractional bits. Error 4e-5 of the row's largest entry. An entry may be
    zero for x <= c - 12.75, and is zero for x <= c - 13.75. Rounds 2 more than `peak`. Scores are
    taken modulo 2**32 with 16 fractional bits (`take_window`), where differences below 2**15 fit.
    Each party sees what it sees in `peak` and `saturate.apply`. How c is rounded depends on the
    parties' own shares; a quotient of two exponentials depends on it only where one is cut to zero.
    With exact rounding that is at x <= c - 27 and beyond.
    """
    share, drop = scores.share, scores.frac - FRACTIONAL_BITS
    narrow = take_window(share, drop)
    shift = yield from peak(ctx, narrow, valid)
    entries = entries_of(valid)
    whole = ctx.exact and drop > 0
    if share.is_meta:
        dtype = torch.int64 if whole else torch.int32
        shifted = torch.empty(len(entries.places), dtype=dtype, device="meta")
    else:
        places, rows = entries.places.to(share.device), entries.rows.to(share.device)
        if whole:
            shifted = share.reshape(-1)[places] - (shift.long()[rows] << drop)
        else:
            shifted = narrow.reshape(-1)[places] - shift[rows]
    window = Cut(shifted, drop, drop) if whole else Cut(shifted)
    powers = yield from apply(ctx, _EXP, window, EXP_FRAC)
    if share.is_meta:
        return torch.empty(scores.shape, dtype=torch.int64, device="meta")
    result = torch.zeros(scores.shape, dtype=torch.int64, device=share.device)
    result.view(-1)[places] = powers
    return result


def exponentials_cost(valid: torch.Tensor) -> Cost:
    """Cost of `exponentials` for rows with these valid entries."""
    return peak_cost(valid) + apply_cost(_EXP, int(valid.sum()))
