"""The maximum of each row to within four units, by histograms: four rounds for a row of any length.

The integer parts x_i are opened once, as z_i = x_i + r_i modulo 2**16. For each the dealer shares a
point function of its mask (`correlations.counters`), whose table, read from z_i on, is one at x_i
and zero elsewhere. The sum of a row's tables is its histogram in shares, without a message.

Numbers modulo 2**16 have no order. But those of a row lie on an arc shorter than half of the
circle, and so its largest one is known by what follows it: the cell that holds it is the one from
which on half a circle is not empty, while half a circle from the next cell on is. In each of 256
cells, 256 integers wide, these two counts are opened under masks, and the dealt one-hot rows of the
masks tell whether they are zero, in XOR shares of one bit. A secret turn t of the row, which the
dealer has added to all places, makes the number of the found cell uniform; it is opened as it is,
eight bits. From there on the same keys yield the histogram of the 384 integers in which the maximum
must lie. It has an order: for each third integer the number of entries from there on is opened
under a mask, and keys of point functions of the masks turn it into arithmetic shares of [there is
none]. Their sum says where the maximum is. Sources: one-time truth tables (Ishai et al., TCC 2013),
compressed by incremental point functions (Boneh et al., IEEE S&P 2021). Finding the end of an arc
by what follows it, and turning the circle, are ours.
"""

from __future__ import annotations

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, Swap
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.correlations.counters import Counters
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.peak import Entries, entries_of, from_integers, integer_parts

STEP = 3
"""Integers between two places where the second histogram is cut; the result is that coarse."""

_CIRCLE_BITS, _CELL_BITS = 16, 8
_CIRCLE = 1 << _CIRCLE_BITS
_CELLS = 1 << (_CIRCLE_BITS - _CELL_BITS)
_SLOT_BITS = _CELL_BITS - 1
"""The first histogram counts in half cells. A carry between z and r, which nobody knows, puts an
entry into its slot or into the next one; finer slots waste less of the second histogram on it."""

_SLOTS = 1 << (_CIRCLE_BITS - _SLOT_BITS)
_ARC = _SLOTS // 2 - 1
"""Slots that a row may span, beside its first: what follows its end is empty for as long."""

_RANGE = 3 << _SLOT_BITS
"""Integers in which the maximum may lie, once its cell is known."""

_CUTS = (_RANGE - 1) // STEP


def crest(ctx: Context, share: torch.Tensor, valid: torch.Tensor) -> Protocol:
    """Shares modulo 2**32 of a multiple of 2**16 in (m - 4 * 2**16, m] for each row's maximum m.

    In: int32 share [R, L], L < 2**15, with 16 fractional bits, whose differences are at most 3.2e4
    within a row; `valid`, public bool [R, L] with at least one True per row. Other entries are
    ignored. Out: [R]. Rounds 4. With 2**w the power of two above the longest row, at least 8, and B
    = 1 byte for rows of up to 255 entries, else 2: online 4 bytes per entry and 2 + 2 * 639 B per
    row; offline 448 bytes per entry (B = 2: 512), and per row 64 * 2**w and 127 times 32 * (w - 2).

    Each party sees the z_i and the counts, each under a fresh, uniform mask of its whole ring; the
    number of a cell plus the turn t of its row modulo 256, where t is fresh and uniform and nothing
    else is opened under it; keys and shares of tables, which look uniform. The carries that decide
    in which of two cells a maximum is found depend on the z_i, but not on t: so the opened number
    is uniform whatever they are. What follows from it is only opened under masks of its own.
    """
    entries = entries_of(valid)
    rows, row = len(entries.counts), entries.rows
    values, kind = integer_parts(share, entries), _Kind(entries)
    count, party = len(row), ctx.party
    # What the dealer needs, in the order in which the parties use it.
    mask = ctx.mask((count,), torch.int16)
    turn = ctx.mask((rows,), torch.int8)
    generator = ctx.point_functions(kind.places.blocks)
    keys = ctx.deal_keys(
        count,
        kind.places.words,
        lambda roots: kind.places.counting(_turned(mask, turn, row), generator)(roots),
    )
    first_mask = ctx.mask((rows, 2, _CELLS), kind.dtype)
    tables = ctx.deal_bits(
        (rows, 2, _CELLS, kind.table_bytes), lambda: _one_hot(first_mask, kind.width)
    )
    second_mask = ctx.mask((rows, _CUTS), kind.dtype)
    single = ctx.point_functions(kind.zeros.blocks)
    zeros = ctx.deal_keys(
        rows * _CUTS,
        kind.zeros.words,
        lambda roots: kind.zeros.counting(kind.low(second_mask), single)(roots),
    )
    if keys is None or zeros is None:
        # Meta tensors only determine the shapes of messages.
        yield from open_under(ctx, values, mask)
        yield from open_under(ctx, first_mask.to("meta"), first_mask)
        yield from _open_cell(ctx, turn.to("meta"), turn)
        yield from open_under(ctx, second_mask.to("meta"), second_mask)
        return from_integers(torch.empty(rows, dtype=torch.int16, device="meta"))
    opened = (yield from open_under(ctx, values, mask)).cpu().numpy()
    places, row_of = opened.astype(np.int64) & (_CIRCLE - 1), row.numpy()
    slots = kind.places.tally(
        keys, 0, places >> _SLOT_BITS, row_of, (rows, _SLOTS), party, generator
    )
    counts = kind.tensor(_after_cells(slots), share)
    counts = yield from open_under(ctx, counts, first_mask)
    cell = np.empty(rows, np.int8)
    _find_cell(kind.low(counts).reshape(counts.shape), tables.cpu().numpy(), cell)
    cell = yield from _open_cell(ctx, torch.from_numpy(cell).to(share.device), turn)
    # The maximum, turned, is above the lowest of these integers.
    start = ((cell.cpu().long().numpy() << _CELL_BITS) - (1 << _SLOT_BITS)) & (_CIRCLE - 1)
    near = kind.places.tally(
        keys, 1, places - start[row_of], row_of, (rows, _RANGE), party, generator
    )
    counts = yield from open_under(ctx, kind.tensor(_from_cuts(near), share), second_mask)
    empty = kind.zeros.tally(
        zeros, 0, kind.low(counts), np.arange(rows * _CUTS), (rows * _CUTS, 1), party, single
    )
    below = (turn.cpu().long().numpy() << _CELL_BITS) + STEP * empty.reshape(rows, -1).sum(
        1, dtype=np.int64
    )
    found = (start + STEP * _CUTS if party == CLIENT else 0) - below
    return from_integers(torch.from_numpy(found).to(torch.int16).to(share.device))


def crest_cost(valid: torch.Tensor) -> Cost:
    """Cost of `crest` for rows with these valid entries."""
    entries = entries_of(valid)
    rows, count, kind = len(entries.counts), len(entries.rows), _Kind(entries)
    counts = 2 * _CELLS + _CUTS
    return Cost(
        rounds=4,
        online=4 * count + (2 + 2 * kind.dtype.itemsize * counts) * rows,
        offline=kind.places.dealt_bytes * count
        + (2 * _CELLS * kind.table_bytes + _CUTS * kind.zeros.dealt_bytes) * rows,
    )


class _Kind:
    """The counters that rows need.

    width: a row has less than 2**width entries, and no table of fewer bits fills a byte. places:
    keys of the entries; their first table counts slots, their second one integers. zeros: keys that
    turn a count into 16-bit shares of whether it is zero.
    """

    def __init__(self, entries: Entries) -> None:
        self.width = max(3, int(entries.counts.max()).bit_length())
        bits = 8 if self.width <= 8 else 16
        self.dtype = torch.int8 if bits == 8 else torch.int16
        self.places = Counters(bits, (_CIRCLE_BITS - _SLOT_BITS, _CIRCLE_BITS))
        self.zeros = Counters(16, (self.width,))

    @property
    def table_bytes(self) -> int:
        """Bytes of a one-hot row that is as long as there are counts."""
        return (1 << self.width) // 8

    def low(self, words: torch.Tensor) -> np.ndarray:
        """Counts, or their masks, modulo 2**width: int64 [n]."""
        return words.cpu().long().numpy().reshape(-1) & ((1 << self.width) - 1)

    def tensor(self, counts: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        """Shares of counts as signed words, on the device of `like`."""
        return torch.from_numpy(counts).view(self.dtype).to(like.device)


def _turned(mask: torch.Tensor, turn: torch.Tensor, row: torch.Tensor) -> np.ndarray:
    """The places of an entry's keys: its mask less its row's turn. Called by the dealer."""
    turned = mask.cpu().long() - (turn.cpu().long() << _CELL_BITS)[row]
    return turned.numpy() & (_CIRCLE - 1)


def _open_cell(ctx: Context, share: torch.Tensor, turn: torch.Tensor) -> Protocol:
    """Open the number of a cell, which its row's turn has been added to: int8 [R], XOR shares.

    Rounds 1, online 2 bytes per row. Raises RuntimeError if the turn was used before.
    """
    ctx.spend(turn)
    if share.is_meta:
        yield Swap(share)
        return share
    other = yield Swap(share)
    return share ^ other


def _after_cells(slots: np.ndarray) -> np.ndarray:
    """For each cell, how many entries follow it, and how many it holds or follow it: [R, 2, cells].

    slots: shares of the histogram [R, slots]. Counted up to half a circle from the cell's end.
    """
    cells = np.arange(0, _SLOTS, 2)
    around = np.zeros((len(slots), 2 * _SLOTS + 1), slots.dtype)
    np.cumsum(np.concatenate([slots, slots], 1), 1, slots.dtype, around[:, 1:])
    end = around[:, cells + 2 + _ARC]
    return np.stack([end - around[:, cells + 2], end - around[:, cells]], 1)


def _from_cuts(near: np.ndarray) -> np.ndarray:
    """Shares of how many entries are at each cut or above: [R, cuts]."""
    above = np.cumsum(near[:, ::-1], 1, near.dtype)[:, ::-1]
    return np.ascontiguousarray(above[:, STEP::STEP])


def _one_hot(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Packed one-hot rows of masks modulo 2**width: uint8 [*mask, 2**width / 8]. By the dealer."""
    out = np.zeros((mask.numel(), (1 << width) // 8), np.uint8)
    _write_one_hot(mask.cpu().long().numpy().reshape(-1) & ((1 << width) - 1), out)
    return torch.from_numpy(out)


@compiled()
def _write_one_hot(places, out):  # type: ignore[no-untyped-def]
    for i in range(places.shape[0]):
        out[i, places[i] >> 3] = 1 << (places[i] & 7)


@compiled()
def _find_cell(places, tables, out):  # type: ignore[no-untyped-def]
    """XOR shares of the number of the cell after which a count is zero, but not with the cell.

    places: opened counts [R, 2, cells]. tables: one-hot rows of their masks, packed.
    """
    for r in range(places.shape[0]):
        found = 0
        for cell in range(places.shape[2]):
            bit = 0
            for which in range(2):
                place = places[r, which, cell]
                bit ^= tables[r, which, cell, place >> 3] >> (place & 7)
            found ^= cell & -(bit & 1)
        out[r] = found
