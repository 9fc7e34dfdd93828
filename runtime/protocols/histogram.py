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

from dataclasses import dataclass

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, Swap, together
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.correlations.counters import Counters
from mergec.runtime.correlations.dpf import Keys
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.peak import (
    Entries,
    entries_of,
    from_integers,
    integer_parts,
    peak,
    peak_cost,
)

FEW = 32
"""Rows of so few entries take less bytes, and no more rounds, if all pairs are compared."""

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

_NARROWEST = 3
"""Tables for counts of fewer bits would not fill a byte."""


def crest(ctx: Context, share: torch.Tensor, valid: torch.Tensor) -> Protocol:
    """Shares modulo 2**32 of a multiple of 2**16 in (m - 4 * 2**16, m] for each row's maximum m.

    In: int32 share [R, L], L < 2**15, with 16 fractional bits, whose differences are at most 3.2e4
    within a row; `valid`, public bool [R, L] with at least one True per row. Other entries are
    ignored. Out: [R]. Rows of up to 32 entries are compared pair by pair (`peak`, 3 rounds, in one
    group each), at the same time as longer ones are sorted into histograms (4 rounds). Bytes of
    these: with 2**w the power of two above a row's length, and B = 1 byte if the longest row has up
    to 255 entries, else 2, online 4 bytes per entry and 2 + 1278 B per row; offline 448 bytes per
    entry (B = 2: 512), and per row 64 * 2**w + 4064 * (w - 2).

    Each party sees the z_i and the counts, each under a fresh, uniform mask of its whole ring; the
    number of a cell plus the turn t of its row modulo 256, where t is fresh and uniform and nothing
    else is opened under it; keys and shares of tables, which look uniform. The carries that decide
    in which of two cells a maximum is found depend on the z_i, but not on t: so the opened number
    is uniform whatever they are. What follows from it is only opened under masks of its own.
    """
    short = valid.sum(1) <= FEW
    if bool(short.all()):
        return (yield from peak(ctx, share, valid, FEW))
    if not bool(short.any()):
        return (yield from _crest(ctx, share, valid))
    one, other = torch.where(short)[0], torch.where(~short)[0]
    found = yield from together(
        peak(ctx, share[one.to(share.device)], valid[one], FEW),
        _crest(ctx, share[other.to(share.device)], valid[other]),
    )
    order = torch.cat([one, other]).argsort().to(share.device)
    return torch.cat(found)[order]


def crest_cost(valid: torch.Tensor) -> Cost:
    """Cost of `crest` for rows with these valid entries."""
    short, total = valid.sum(1) <= FEW, Cost()
    if bool(short.any()):
        total = total.beside(peak_cost(valid[short], FEW))
    if not bool(short.all()):
        total = total.beside(_crest_cost(valid[~short]))
    return total


def _crest(ctx: Context, share: torch.Tensor, valid: torch.Tensor) -> Protocol:
    """`crest` by histograms for all rows."""
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
    tables = [same.deal_tables(ctx, first_mask) for same in kind.classes]
    second_mask = ctx.mask((rows, _CUTS), kind.dtype)
    dealt_zeros = [same.deal_zeros(ctx, second_mask) for same in kind.classes]
    zeros = [each for each in dealt_zeros if each is not None]
    if keys is None:
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
    counts = yield from open_under(ctx, kind.tensor(_after_cells(slots), share), first_mask)
    cell = np.empty(rows, np.int8)
    for same, dealt in zip(kind.classes, tables, strict=True):
        cell[same.rows] = same.find_cells(counts, dealt)
    cell = yield from _open_cell(ctx, torch.from_numpy(cell).to(share.device), turn)
    # The maximum, turned, is above the lowest of these integers.
    start = ((cell.cpu().long().numpy() << _CELL_BITS) - (1 << _SLOT_BITS)) & (_CIRCLE - 1)
    near = kind.places.tally(
        keys, 1, places - start[row_of], row_of, (rows, _RANGE), party, generator
    )
    counts = yield from open_under(ctx, kind.tensor(_from_cuts(near), share), second_mask)
    below = turn.cpu().long().numpy() << _CELL_BITS
    for same, zero_keys in zip(kind.classes, zeros, strict=True):
        below[same.rows] += STEP * same.count_zeros(ctx, counts, zero_keys)
    found = (start + STEP * _CUTS if party == CLIENT else 0) - below
    return from_integers(torch.from_numpy(found).to(torch.int16).to(share.device))


def _crest_cost(valid: torch.Tensor) -> Cost:
    entries = entries_of(valid)
    rows, count, kind = len(entries.counts), len(entries.rows), _Kind(entries)
    counts = 2 * _CELLS + _CUTS
    return Cost(
        rounds=4,
        online=4 * count + (2 + 2 * kind.dtype.itemsize * counts) * rows,
        offline=kind.places.dealt_bytes * count
        + sum(same.dealt_bytes * len(same.rows) for same in kind.classes),
    )


class _Kind:
    """The counters that rows need.

    dtype: of a count; its ring is larger than the longest row. places: keys of the entries; their
    first table counts slots, their second one integers. classes: rows of about the same length.
    """

    def __init__(self, entries: Entries) -> None:
        widths = [max(_NARROWEST, count.bit_length()) for count in entries.counts.tolist()]
        bits = 8 if max(widths) <= 8 else 16
        self.dtype = torch.int8 if bits == 8 else torch.int16
        self.places = Counters(bits, (_CIRCLE_BITS - _SLOT_BITS, _CIRCLE_BITS))
        each = np.array(widths)
        self.classes = [_Class(width, np.flatnonzero(each == width)) for width in sorted({*widths})]

    def tensor(self, counts: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        """Shares of counts as signed words, on the device of `like`."""
        return torch.from_numpy(counts).view(self.dtype).to(like.device)


@dataclass(frozen=True, eq=False)
class _Class:
    """Rows with less than 2**width entries: what tells whether a count is zero modulo 2**width.

    rows: their numbers.
    """

    width: int
    rows: np.ndarray

    @property
    def table_bytes(self) -> int:
        """Bytes of a one-hot row that has an entry for each count."""
        return (1 << self.width) // 8

    @property
    def zeros(self) -> Counters:
        """Keys that turn an opened count into 16-bit shares of whether it is zero."""
        return Counters(16, (self.width,))

    @property
    def dealt_bytes(self) -> int:
        """Bytes that the dealer sends for all tables and keys of a row."""
        return 2 * _CELLS * self.table_bytes + _CUTS * self.zeros.dealt_bytes

    def deal_tables(self, ctx: Context, mask: torch.Tensor) -> torch.Tensor:
        """One-hot rows of the masks [R, 2, cells] of counts: [rows, 2, cells, bytes]."""
        shape = (len(self.rows), 2, _CELLS, self.table_bytes)
        return ctx.deal_bits(shape, lambda: _one_hot(self._low(mask), self.table_bytes))

    def find_cells(self, counts: torch.Tensor, tables: torch.Tensor) -> np.ndarray:
        """XOR shares of the numbers of cells, from opened counts [R, 2, cells]: int8 [rows]."""
        found = np.empty(len(self.rows), np.int8)
        _find_cells(self._low(counts), tables.cpu().numpy(), found)
        return found

    def deal_zeros(self, ctx: Context, mask: torch.Tensor) -> Keys | None:
        """Keys of the masks [R, cuts] of counts; None at the dealer."""
        generator = ctx.point_functions(self.zeros.blocks)
        return ctx.deal_keys(
            len(self.rows) * _CUTS,
            self.zeros.words,
            lambda roots: self.zeros.counting(self._low(mask).reshape(-1), generator)(roots),
        )

    def count_zeros(self, ctx: Context, counts: torch.Tensor, keys: Keys) -> np.ndarray:
        """Shares modulo 2**16 of how many of the opened counts [R, cuts] are zero: int64 [rows]."""
        generator = ctx.point_functions(self.zeros.blocks)
        places = self._low(counts).reshape(-1)
        shape = (len(places), 1)
        found = self.zeros.tally(
            keys, 0, places, np.arange(len(places)), shape, ctx.party, generator
        )
        return found.reshape(len(self.rows), _CUTS).sum(1, dtype=np.int64)

    def _low(self, words: torch.Tensor) -> np.ndarray:
        """Counts of these rows, or their masks, modulo 2**width: int64 [rows, ...]."""
        return words.cpu().numpy()[self.rows].astype(np.int64) & ((1 << self.width) - 1)


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


def _one_hot(places: np.ndarray, size: int) -> torch.Tensor:
    """Packed one-hot rows of `size` bytes, uint8 [..., size]. Called by the dealer."""
    out = np.zeros((places.size, size), np.uint8)
    _write_one_hot(places.reshape(-1), out)
    return torch.from_numpy(out)


@compiled()
def _write_one_hot(places, out):  # type: ignore[no-untyped-def]
    for i in range(places.shape[0]):
        out[i, places[i] >> 3] = 1 << (places[i] & 7)


@compiled()
def _find_cells(places, tables, out):  # type: ignore[no-untyped-def]
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
