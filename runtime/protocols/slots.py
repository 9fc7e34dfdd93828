"""The maximum of each row to within four units, by one histogram: two rounds, for rows near it.

As in `histogram`, integer parts are taken relative to the row's first entry, so the largest is not
negative, and a row's maximum follows from how many entries are at a place or above. Here the rows
are known not to spread further than 2**bits, so that one histogram covers them, in slots of two
integers. It has few enough slots for its tables to be dealt entry by entry: the client's share of
each table is the next bytes of its own stream, and the server gets the rest. So are the tables that
tell which counts are zero. Nothing is dealt to the client. Sources: see `histogram`, and one-time
truth tables (Ishai et al., TCC 2013).
"""

from __future__ import annotations

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.histogram import crest, crest_cost, from_first
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.peak import Entries, entries_of, from_integers, integer_parts

LONGEST = 255
"""Entries of a row that counters of eight bits can count. Longer rows are served by `crest`."""

_SLOT_BITS = 1


def top_slot(ctx: Context, share: torch.Tensor, valid: torch.Tensor, bits: int) -> Protocol:
    """Shares modulo 2**32 of a multiple of 2**16 in (m - 4 * 2**16, m] for each row's maximum m.

    In: int32 share [R, L] with 16 fractional bits, whose differences are at most 2**bits - 4 within
    a row; `valid`, public bool [R, L] with at least one True per row. Other entries are ignored.
    Out: [R]. Rows that spread further return another number. Rounds 2. With 2**w the power of two
    above the longest row's length, online 4 bytes per entry and 2**bits - 2 per row; offline, to
    the server alone, 2**bits bytes per entry and 2 * 2**w * (2**(bits - 1) - 1) per row. If a row
    has more than 255 entries, `crest` serves all, with its rounds and bytes.

    Each party sees slots and counts, each under a fresh, uniform mask of its whole ring, used once.
    The server's tables are the differences to bytes of the client's stream, which are fresh,
    uniform and unknown to it. Of the first entry of a row, whose slot is zero, the mask is opened,
    which tells nothing.
    """
    entries = entries_of(valid)
    if int(entries.counts.max()) > LONGEST:
        return (yield from crest(ctx, share, valid))
    rows, row, slots = len(entries.counts), entries.rows.numpy(), 1 << bits
    width, places = _width(entries), slots // 2 - 1
    values, first = from_first(integer_parts(share, entries), entries)
    # The carry out of the lowest bit is lost, so that a slot may be one too low. The first entry's
    # share is zero at both parties, and its slot exact.
    values = values >> _SLOT_BITS if not values.is_meta else values
    mask = ctx.mask((len(row),), torch.int16)
    counters = ctx.deal_corrected((len(row), slots), lambda s: _one_hot(mask, s))
    hidden = ctx.mask((rows, places), torch.int8)
    zeros = ctx.deal_corrected(
        (rows * places, 2 << width), lambda s: _one_hot(hidden, s.view(np.int16)).view(np.uint8)
    )
    opened = yield from open_under(ctx, values, mask)
    if counters is None or zeros is None:
        yield from open_under(ctx, hidden.to("meta"), hidden)
        return from_integers(torch.empty(rows, dtype=torch.int16, device="meta"))
    counts = np.zeros((rows, slots // 2), np.uint8)
    _tally(counters, opened.cpu().long().numpy(), row, counts)
    # How many entries are in each slot but the lowest, or above it.
    above = np.cumsum(counts[:, ::-1], 1, np.uint8)[:, ::-1][:, 1:]
    mine = torch.from_numpy(np.ascontiguousarray(above)).view(torch.int8).to(share.device)
    masked = yield from open_under(ctx, mine, hidden)
    empty = np.zeros((rows, 1), np.int16)
    _tally(
        zeros.view(np.int16), masked.cpu().long().numpy().reshape(-1),
        np.repeat(np.arange(rows), places), empty,
    )  # fmt: skip
    top = ctx.public(torch.full((rows,), places)) - torch.from_numpy(empty[:, 0]).long()
    return from_integers(first + (top << _SLOT_BITS).to(torch.int16).to(share.device))


def top_slot_cost(valid: torch.Tensor, bits: int) -> Cost:
    """Cost of `top_slot` for rows with these valid entries."""
    entries = entries_of(valid)
    if int(entries.counts.max()) > LONGEST:
        return crest_cost(valid)
    rows, count, slots = len(entries.counts), len(entries.rows), 1 << bits
    places = slots // 2 - 1
    return Cost(
        rounds=2,
        online=4 * count + 2 * places * rows,
        offline=slots * count + (2 << _width(entries)) * places * rows,
    )


def _width(entries: Entries) -> int:
    """Bits of the largest count."""
    return int(entries.counts.max()).bit_length()


def _one_hot(mask: torch.Tensor, share: np.ndarray) -> np.ndarray:
    """The server's share of tables [n, N] that are one at each mask modulo N; N a power of two."""
    _subtract_one_hot(mask.cpu().long().numpy().reshape(-1), share)
    return share


@compiled()
def _subtract_one_hot(places, share):  # type: ignore[no-untyped-def]
    for i in range(share.shape[0]):
        row = share[i]
        for k in range(row.shape[0]):
            row[k] = -row[k]
        row[places[i] & (row.shape[0] - 1)] += 1


@compiled()
def _tally(tables, places, rows, out):  # type: ignore[no-untyped-def]
    """Add each table, read from its place on downwards, to its row of `out`."""
    last = tables.shape[1] - 1
    for i in range(tables.shape[0]):
        table, target = tables[i], out[rows[i]]
        for k in range(target.shape[0]):
            target[k] += table[(places[i] - k) & last]
