"""Softmax weights of score rows by the logarithm of a row's sum: no maximum, and no division.

    p_i = exp(x_i) / D = exp(x_i - log D)  for  D = sum of exp(x_j)

With x_j the score less that of the row's first entry, D is at least 1. If scores of a row spread by
less than S, it is below L exp(S): a few hundred bits, which words of exponentials may have
(`broad`). So D is opened as it is, and a key turns it into a share of its logarithm (`logarithm`).
A second table of exponentials then yields the weights themselves. Nothing has to be shifted by
about the maximum before, and what is weighed by them needs no scaling after.

That each probability takes an exponential of its own, of a logarithm, is common; to sum up
exponentials of any size in one word, and open them at once, is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import FRACTIONAL_BITS, RING_BITS, Cost
from mergec.runtime.core.values import Shared, logical_shift
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.long import HALF_BITS
from mergec.runtime.protocols.broad import (
    Broad,
    broad_sums,
    broad_sums_cost,
)
from mergec.runtime.protocols.compare import take_window
from mergec.runtime.protocols.finer import HALVES
from mergec.runtime.protocols.histogram import from_first
from mergec.runtime.protocols.logarithm import LongLog, long_log, long_log_cost
from mergec.runtime.protocols.opening import Cut
from mergec.runtime.protocols.peak import entries_of

LONGEST = 4096
"""Entries of a row."""

_RESERVE = 10
"""A row may spread by 2**bits less this: log D is at most 8.4 above the maximum, and the table's
range ends at 1."""

_SUM_FRAC = 22
"""Fractional bits of D."""


@dataclass(frozen=True)
class ByLogarithm:
    """How rows are weighed whose entries differ by at most 2**bits - 10, with bits from 6 to 9."""

    bits: int

    @property
    def spread(self) -> float:
        """How far the entries of a row may be apart."""
        return 2.0**self.bits - _RESERVE

    @cached_property
    def logarithm(self) -> LongLog:
        """log D, in as many bits as leave room for differences of scores modulo 2**64."""
        octaves = self.spread / math.log(2) + math.log2(LONGEST) + 1
        return LongLog(_SUM_FRAC, math.ceil(octaves), RING_BITS - 1 - self.bits)

    @cached_property
    def sums(self) -> Broad:
        """Exponentials of entries less the first one, which are less than 2**bits to either side,
        as they are added up."""
        kept = HALF_BITS * self.logarithm.halves
        return Broad(self.bits + 1, 1 << self.bits, _SUM_FRAC, kept)

    def weights(self, frac: int) -> Broad:
        """Exponentials of entries less log D, which are at most 0."""
        return Broad(self.bits, 1, frac, HALF_BITS * HALVES)


WAYS = {f"log-{bits}": ByLogarithm(bits) for bits in range(6, 10)}
"""By their names in programs."""


def probabilities(
    ctx: Context, scores: Shared, valid: torch.Tensor, way: ByLogarithm, frac: int
) -> Protocol:
    """Shares modulo 2**96 of the softmax over valid entries: halves int32 [R, L, 3].

    In: Shared [R, L] with 16 to 48 fractional bits, whose valid entries differ by at most
    `way.spread` within a row; `valid`, public bool [R, L] with 1 to 4096 True per row. Out: zero
    where `valid` is False. frac: its fractional bits, 1 to 48. Error less than a unit, at random
    with the right expectation, 2**-27, and 2**-14 of the value. Rows that spread further return
    other numbers.

    Rounds 3. With H 32-bit halves of a sum, `way.sums.kept` / 32: online 16 bytes per entry and 8 H
    per row. Offline, to the server, the words of two tables per entry (`Broad.dealt_bytes`), and to
    both parties a key per row (`long_log`). Each party sees a 32-bit window of each entry less the
    row's first one, the sum of the row's exponentials modulo 2**(32 H), and a window of each entry
    less the logarithm of that sum, each under a fresh mask that is uniform on its whole ring and
    used once; and keys, which look uniform. Of the first entry of a row, whose difference is zero,
    the mask is opened, which tells nothing.
    """
    entries, share = entries_of(valid), scores.share
    counts, rows = entries.counts, entries.rows
    narrow, logarithm = take_window(share, scores.frac - FRACTIONAL_BITS), way.logarithm
    if share.is_meta:
        first = ghost((len(entries.places),), dtype=torch.int32)
    else:
        entries = entries.on(share.device)
        first, _ = from_first(narrow.reshape(-1)[entries.places], entries)
    sums = yield from broad_sums(ctx, Cut(first), way.sums, rows, counts)
    logs = yield from long_log(ctx, sums, logarithm)
    window = first
    if not share.is_meta:
        # Only differences count, and these fit into the ring above the logarithm's bits.
        whole, _ = from_first(share.reshape(-1)[entries.places], entries)
        whole = (whole << (logarithm.frac - scores.frac)) - logs[entries.rows]
        window = logical_shift(whole, logarithm.frac - FRACTIONAL_BITS).to(torch.int32)
        # What both parties cut off is one unit, on average.
        window = window + ctx.public(torch.ones_like(window))
    each = torch.arange(len(rows))
    powers = yield from broad_sums(ctx, Cut(window), way.weights(frac), each, torch.ones_like(each))
    shape = (*scores.shape, HALVES)
    if share.is_meta:
        return ghost(shape, dtype=torch.int32)
    result = torch.zeros(shape, dtype=torch.int32, device=share.device)
    result.view(-1, HALVES)[entries.places] = powers
    return result


def probabilities_cost(valid: torch.Tensor, way: ByLogarithm, frac: int) -> Cost:
    """Cost of `probabilities` for rows with these valid entries."""
    count, rows = int(valid.sum()), len(valid)
    halves = way.sums.kept // HALF_BITS
    return (
        broad_sums_cost(count, way.sums)
        + long_log_cost(way.logarithm, rows, halves)
        + broad_sums_cost(count, way.weights(frac))
    )
