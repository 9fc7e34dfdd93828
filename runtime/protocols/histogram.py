"""The maximum of each row to within four units, by histograms: four rounds for a row of any length.

From the integer part of each entry that of the row's first entry is subtracted. What is left, x_i,
is a number with a sign, and the largest one is not negative, as one of them is zero. They are
opened once, as z_i = x_i + r_i modulo 2**16. For each the dealer shares a point function of its
mask (`correlations.counters`), whose table, read from z_i on, is one at x_i and zero elsewhere. The
sum of a row's tables is its histogram in shares, without a message. Summed up from its end, it says
how many entries are at a place or above. These counts are opened under masks, and keys of point
functions of the masks turn them into shares of [there is none], whose sum tells where the maximum
is.

This is done twice. First for places 256 integers apart, with tables of the top bits of r_i: it
yields the cell of the maximum, in shares modulo 2**8. The cell is opened under a mask t. Then for
every third integer near that cell: the dealer knows r_i - 256 t, and z_i minus the opened cell is
the other part of where an entry lies relative to the cell. Sources: one-time truth tables (Ishai et
al., TCC 2013), compressed by distributed point functions (`correlations.dpf`). Histograms of masked
numbers are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import Cost
from mergec.runtime.correlations.counters import Counters
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.peak import (
    Entries,
    entries_of,
    from_integers,
    integer_parts,
    peak,
    peak_cost,
)

FEW = 40
"""Rows of so few entries take less bytes, and no more rounds, if all pairs are compared."""

STEP = 3
"""Integers between two places where the second histogram is cut; the result is that coarse."""

_CIRCLE_BITS, _CELL_BITS = 16, 8
_CIRCLE, _CELL = 1 << _CIRCLE_BITS, 1 << _CELL_BITS
_SLOT_BITS = _CELL_BITS - 1
"""The first histogram counts in half cells. A carry between z and r, which nobody knows, puts an
entry into its slot or into the next one; finer slots waste less of the second histogram on it."""

_SLOTS = 1 << (_CIRCLE_BITS - _SLOT_BITS)
_POSITIVE = _SLOTS // 2
"""Slots of numbers that are not negative. Those of a row reach neither end: 3.2e4 is below them."""

_RANGE = 3 << _SLOT_BITS
"""Integers in which the maximum may lie, once its cell is known."""

_CELLS, _CUTS = _POSITIVE // 2 - 1, (_RANGE - 1) // STEP
"""Counts that are opened for each row: 127 of the first histogram, and as many of the second."""

_NARROWEST = 4
"""Counts of fewer bits would not fill a leaf of 16 entries."""


def crest(ctx: Context, share: torch.Tensor, valid: torch.Tensor) -> Protocol:
    """Shares modulo 2**32 of a multiple of 2**16 in (m - 4 * 2**16, m] for each row's maximum m.

    In: int32 share [R, L], L < 2**15, with 16 fractional bits, whose differences are at most 3.2e4
    within a row; `valid`, public bool [R, L] with at least one True per row. Other entries are
    ignored. Out: [R]. Rows of up to 40 entries are compared pair by pair (`peak`, 3 rounds, in one
    group each), at the same time as longer ones are sorted into histograms (4 rounds). Bytes of
    these: with 2**w the power of two above a row's length, and B = 1 byte if the longest row has up
    to 255 entries, else 2, online 4 bytes per entry and 2 + 508 B per row; offline 608 bytes per
    entry (B = 2: 672), and 4064 * (2 w - 5) per row.

    Each party sees integer parts, counts and a cell, each under a fresh, uniform mask of its whole
    ring, used once; and keys, which look uniform. In which of two cells a maximum is found depends
    on carries, and these on the z_i; but the cell's mask does not. Of the first entry of a row,
    whose x_i is zero, the mask is opened, which tells nothing.
    """
    short = valid.sum(1) <= FEW
    if bool(short.all()):
        return (yield from peak(ctx, share, valid, FEW))
    if not bool(short.any()):
        return (yield from _crest(ctx, share, valid))
    one, other = torch.where(short)[0], torch.where(~short)[0]
    order = torch.cat([one, other]).argsort()
    some, rest, back = (to_device(rows, share.device, "public") for rows in (one, other, order))
    found = yield from together(
        peak(ctx, share[some], valid[one], FEW), _crest(ctx, share[rest], valid[other])
    )
    return torch.cat(found)[back]


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
    entries = entries_of(valid).on(ctx.device)
    rows, row, kind = len(entries.counts), entries.rows, _Kind(entries, ctx.device)
    values, first = from_first(integer_parts(share, entries), entries)
    # What the dealer needs, in the order in which the parties use it.
    mask = ctx.mask((len(row),), torch.int16)
    slots = Tables(ctx, kind.slots, lambda: _places(mask) >> _SLOT_BITS, len(row))
    cells = _Zeros(ctx, kind, rows, _CELLS, 8)
    cell_mask = ctx.mask((rows,), torch.int8)
    near = Tables(
        ctx,
        kind.near,
        lambda: _places(mask.long() - (cell_mask.long() << _CELL_BITS)[row]),
        len(row),
    )
    cuts = _Zeros(ctx, kind, rows, _CUTS, 16)
    opened = yield from open_under(ctx, values, mask)
    if values.is_meta:
        # Meta tensors only determine the shapes of messages.
        yield from cells.open(ctx, cells.mask.to("meta"))
        yield from open_under(ctx, cell_mask.to("meta"), cell_mask)
        yield from cuts.open(ctx, cuts.mask.to("meta"))
        return from_integers(ghost((rows,), dtype=torch.int16))
    place = _places(opened)
    counts = slots.tally(ctx, place >> _SLOT_BITS, row, (rows, _POSITIVE))
    above = yield from cells.open(ctx, at_or_above(counts, 2))
    cell = ctx.public(torch.full((rows,), _CELLS, device=place.device)) - cells.count(ctx, above)
    cell = yield from open_under(ctx, cell.to(torch.int8), cell_mask)
    # The lowest of the integers that the maximum is above or at, plus the mask of its cell.
    start = (cell.long() << _CELL_BITS) - (1 << _SLOT_BITS)
    counts = near.tally(ctx, place - start[row], row, (rows, _RANGE))
    above = yield from cuts.open(ctx, at_or_above(counts, STEP))
    found = ctx.public(start + STEP * _CUTS) - (cell_mask.long() << _CELL_BITS)
    found = found - STEP * cuts.count(ctx, above)
    return from_integers(first + found.to(torch.int16))


def _crest_cost(valid: torch.Tensor) -> Cost:
    entries = entries_of(valid)
    rows, count = len(entries.counts), len(entries.rows)
    kind = _Kind(entries, torch.device("cpu"))
    return Cost(
        rounds=4,
        online=4 * count + (2 + 2 * kind.dtype.itemsize * (_CELLS + _CUTS)) * rows,
        offline=(kind.slots.dealt_bytes + kind.near.dealt_bytes) * count
        + sum(
            count * number * Counters(bits, width).dealt_bytes
            for width, _, count in kind.classes
            for number, bits in ((_CELLS, 8), (_CUTS, 16))
        ),
    )


class _Kind:
    """The counters that rows need.

    dtype: of a count; its ring is larger than the longest row. slots, near: keys of the entries,
    for the first and the second histogram. classes: a width, the rows with less than 2**width
    entries, or None if these are all, and how many they are.
    """

    def __init__(self, entries: Entries, device: torch.device) -> None:
        widths = np.array([max(_NARROWEST, n.bit_length()) for n in entries.counts.tolist()])
        bits = 8 if widths.max() <= 8 else 16
        self.dtype = torch.int8 if bits == 8 else torch.int16
        self.slots = Counters(bits, _CIRCLE_BITS - _SLOT_BITS)
        self.near = Counters(bits, _CIRCLE_BITS)
        self.classes: list[tuple[int, torch.Tensor | None, int]] = []
        for width in np.unique(widths).tolist():
            rows = torch.from_numpy(np.flatnonzero(widths == width))
            some = to_device(rows, device, "public") if len(rows) < len(widths) else None
            self.classes.append((width, some, len(rows)))


class Tables:
    """Keys of a table for each place, dealt when this is made."""

    def __init__(
        self, ctx: Context, counters: Counters, places: Callable[[], torch.Tensor], count: int
    ) -> None:
        """places: called by the dealer; returns int64 [count]."""
        self._counters, self._generator = counters, ctx.point_functions(1)
        self._keys = ctx.deal_keys(
            count,
            counters.words,
            lambda roots: counters.counting(places(), self._generator)(roots),
        )

    def tally(
        self, ctx: Context, first: torch.Tensor, rows: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        """A party's shares of the histograms of first - place: see `Counters.tally`."""
        if self._keys is None:
            raise RuntimeError("the dealer has no keys")
        return self._counters.tally(self._keys, first, rows, shape, ctx.party, self._generator)


class _Zeros:
    """Masks of `number` counts for each row, and keys that tell which of the opened ones are zero.

    A count is opened modulo 2**8 or 2**16 and looked up modulo 2**width, which is more than the
    row's length. bits: of the shares that keys yield.
    """

    def __init__(self, ctx: Context, kind: _Kind, rows: int, number: int, bits: int) -> None:
        self.mask = ctx.mask((rows, number), kind.dtype)
        self._parts = [
            (
                width,
                same,
                Tables(ctx, Counters(bits, width), self._low(width, same), count * number),
            )
            for width, same, count in kind.classes
        ]

    def _low(self, width: int, rows: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        return lambda: _of_rows(_places(self.mask, width), rows).reshape(-1)

    def open(self, ctx: Context, counts: torch.Tensor) -> Protocol:
        """Open counts [R, number] under the masks."""
        return (yield from open_under(ctx, counts, self.mask))

    def count(self, ctx: Context, opened: torch.Tensor) -> torch.Tensor:
        """Shares modulo 2**bits of how many counts of each row are zero, int64 [R]."""
        found = torch.empty(len(opened), dtype=torch.int64, device=opened.device)
        for width, same, tables in self._parts:
            places = _of_rows(_places(opened, width), same)
            each = torch.arange(places.numel(), device=places.device)
            zero = tables.tally(ctx, places.reshape(-1), each, (places.numel(), 1))
            found[slice(None) if same is None else same] = zero.reshape(places.shape).sum(1)
        return found


def _of_rows(words: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return words if rows is None else words[rows]


def from_first(values: torch.Tensor, entries: Entries) -> tuple[torch.Tensor, torch.Tensor]:
    """Each value less the first one of its row, and the first ones: [entries], [rows]."""
    if values.is_meta:
        return values, values
    first = values[entries.firsts]
    return values - first[entries.rows], first


def _places(words: torch.Tensor, width: int = _CIRCLE_BITS) -> torch.Tensor:
    """Words modulo 2**width, as int64."""
    return words.long() & ((1 << width) - 1)


def at_or_above(counts: torch.Tensor, step: int) -> torch.Tensor:
    """Shares of how many entries are at each multiple of `step` above zero, or higher: [R, ...]."""
    above = counts.flip(1).cumsum(1, dtype=counts.dtype).flip(1)
    return above[:, step::step].contiguous()
