"""The maximum of each row to within a few units, by one histogram, for rows that spread little.

As in `histogram`, integer parts are taken relative to the row's first entry, so the largest is not
negative, and a row's maximum follows from how many entries are at a place or above. Here the rows
are known not to spread further than 2**bits, so that one histogram covers them, in slots of two
integers or, if coarse, of four. It has few enough slots for its tables to be dealt entry by entry:
the client's share of each table is the next bytes of its own stream, and the server gets the rest.
So are the tables that tell which counts are zero: of a word for each count that there may be, or,
for one round more and a small part of the bytes, of a bit for each value of its digits. Nothing is
dealt to the client. Or the first tables are dealt as keys to both parties, as in `histogram`: fewer
bytes on the server's link, and as many on the client's. Sources: see `histogram`, and one-time
truth tables (Ishai et al., TCC 2013).
"""

from __future__ import annotations

from functools import cache

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.correlations.counters import Counters
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.digits import Relations
from mergec.runtime.protocols.formula import Formula, conjunction, open_bits
from mergec.runtime.protocols.histogram import Tables, at_or_above, from_first
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.peak import Entries, entries_of, from_integers, integer_parts

LONGEST = 255
"""Entries of a row that counters of eight bits can count."""

_NARROWEST = 3
"""The table of a digit of fewer bits fills no byte."""

_INDICES = 1 << 24
"""Indices that exist at once on a device."""

_TOGETHER = 1 << 16
"""Entries whose tables exist at once; what is dealt does not depend on it."""

_EMPTY = Formula(conjunction((0, 1)))
"""A count is zero if both of its digits are."""


def top_slot(
    ctx: Context,
    share: torch.Tensor,
    valid: torch.Tensor,
    bits: int,
    digits: bool = False,
    keys: bool = False,
    coarse: bool = False,
) -> Protocol:
    """Shares modulo 2**32 of a multiple of 2**16 in (m - d * 2**16, m] for each row's maximum m.

    d is 4 or, with `coarse`, 8.
    In: int32 share [R, L], L < 2**15, with 16 fractional bits, whose differences are at most
    2**bits - d within a row; `valid`, public bool [R, L] with at least one True per row. Other
    entries are ignored. Out: [R]. Rows that spread further return another number; one unit further
    is allowed for, as the windows of two scores may be cut apart by that much (`take_window`).
    digits: whether counts are found to be zero digit by digit; they always are if a row has more
    than 255 entries. keys: whether tables of slots are dealt as keys of point functions.

    With 2**w the power of two above the longest row's length, B = 1 byte if that is 255 at most,
    else 2, b = `bits`, less 1 if coarse, and P = 2**(b - 1) - 1 counts for each row: offline, to
    the server alone, 2**b B bytes per entry; online 4 bytes per entry and 2 P B per row. By words,
    rounds 2, and offline 2**(w + 1) P per row more. By digits of u = w / 2, rounded up, and
    v = w - u bits, but at least 3 each: rounds 3, and 2 P per row more online,
    (8 + 2**(u - 3) + 2**(v - 3)) P offline. With keys, each party is dealt 16 bytes for each of
    b - 4 + log2 B levels, and 16 more, for an entry, and the server no table of slots.

    Each party sees slots, counts and, by digits, bits, each under a fresh, uniform mask of its
    whole ring, used once. The server's tables are the differences to bytes of the client's stream,
    which are fresh, uniform and unknown to it; keys look uniform (`dpf`). Of the first entry of a
    row, whose slot is zero, the mask is opened, which tells nothing.
    """
    entries = entries_of(valid).on(ctx.device)
    rows, row, slots = len(entries.counts), entries.rows, 1 << _count_bits(bits, coarse)
    places, kind = slots // 2 - 1, _kind(_longest(entries))
    values, first = from_first(integer_parts(share, entries), entries)
    # The carry out of the lowest bits is lost, so that a slot may be one too low. The first entry's
    # share is zero at both parties, and its slot exact.
    values = values >> _width_bits(coarse) if not values.is_meta else values
    mask = ctx.mask((len(row),), torch.int16)
    zeros = _zeros(kind, digits)(ctx, entries, places)
    opened = yield from open_under(ctx, values, mask)
    size = (rows, slots // 2)
    counts = ghost(size, dtype=kind) if opened.is_meta else opened.new_zeros(size, dtype=kind)
    tally = _tally_keys if keys else _tally_tables
    for start in range(0, len(row), _TOGETHER):
        piece = slice(start, start + _TOGETHER)
        tally(ctx, mask[piece], opened[piece], row[piece], counts)
    if opened.is_meta:
        yield from zeros.count(ctx, zeros.mask.to("meta"))
        return from_integers(ghost((rows,), dtype=torch.int16))
    # How many entries are in each slot but the lowest, or above it.
    empty = yield from zeros.count(ctx, at_or_above(counts, 1))
    top = ctx.public(torch.full((rows,), places, device=share.device)) - empty.long()
    return from_integers(first + (top << _width_bits(coarse)).to(torch.int16))


def top_slot_cost(
    valid: torch.Tensor,
    bits: int,
    digits: bool = False,
    keys: bool = False,
    coarse: bool = False,
) -> Cost:
    """Cost of `top_slot` for rows with these valid entries."""
    entries = entries_of(valid)
    rows, count, longest = len(entries.counts), len(entries.rows), _longest(entries)
    wide = _count_bits(bits, coarse)
    places = (1 << wide) // 2 - 1
    zeros = _zeros(_kind(longest), digits).cost(rows * places, entries)
    counters = _counters(wide, _kind(longest))
    dealt = counters.dealt_bytes if keys else slot_bytes(bits, longest, coarse)
    return Cost(1, 4 * count, dealt * count) + zeros


def slot_bytes(bits: int, length: int, coarse: bool = False) -> int:
    """Bytes of the table that `top_slot` deals for an entry, if the longest row has `length`."""
    return _kind(length).itemsize << _count_bits(bits, coarse)


def _count_bits(bits: int, coarse: bool) -> int:
    """Binary logarithm of the number of slots, which reach 2**bits to either side of the first."""
    return bits + 1 - _width_bits(coarse)


def _width_bits(coarse: bool) -> int:
    """Binary logarithm of the integers of a slot."""
    return 2 if coarse else 1


def _counters(bits: int, kind: torch.dtype) -> Counters:
    """Keys of tables of slots."""
    return Counters(8 * kind.itemsize, bits)


def _tally_tables(
    ctx: Context,
    mask: torch.Tensor,
    opened: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Deal tables of slots, and add up in `counts`, one for every two slots, what they hold."""
    tables = _deal_one_hot(ctx, mask, 2 * counts.shape[1], counts.dtype)
    if tables is not None and not opened.is_meta:
        counts += _TALLIED(tables, opened.long(), rows, tuple(counts.shape))


def _tally_keys(
    ctx: Context,
    mask: torch.Tensor,
    opened: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """The same by keys of point functions."""
    slots = 2 * counts.shape[1]
    counters = _counters(slots.bit_length() - 1, counts.dtype)
    tables = Tables(ctx, counters, lambda: mask.long() & (slots - 1), len(mask))
    if not opened.is_meta:
        counts += tables.tally(ctx, opened.long(), rows, (counts.shape[0], counts.shape[1]))


def _width(entries: Entries) -> int:
    """Bits of the largest count."""
    return _longest(entries).bit_length()


def _longest(entries: Entries) -> int:
    return int(entries.counts.max())


def _kind(length: int) -> torch.dtype:
    """The type of a counter for rows of up to `length` entries."""
    return torch.int8 if length <= LONGEST else torch.int16


def _zeros(kind: torch.dtype, digits: bool) -> type[_Words] | type[_Digits]:
    return _Digits if digits or kind is not torch.int8 else _Words


class _Words:
    """How many counts of each row are zero, by a table of words for each count: one round."""

    def __init__(self, ctx: Context, entries: Entries, places: int) -> None:
        self._shape = len(entries.counts), places
        self.mask = ctx.mask(self._shape, torch.int8)
        self._tables = _deal_one_hot(ctx, self.mask, 1 << _width(entries), torch.int16)

    def count(self, ctx: Context, counts: torch.Tensor) -> Protocol:
        """Shares modulo 2**16 of how many are zero, int16 [R], from shares of counts [R, P]."""
        opened = yield from open_under(ctx, counts, self.mask)
        if self._tables is None:
            return opened[:, 0].to(torch.int16)
        rows, places = self._shape
        each = torch.arange(rows, device=opened.device).repeat_interleave(places)
        found: torch.Tensor = _TALLIED(self._tables, opened.long().reshape(-1), each, (rows, 1))
        return found[:, 0]

    @staticmethod
    def cost(counts: int, entries: Entries) -> Cost:
        return Cost(1, 2 * counts, (2 << _width(entries)) * counts)


class _Digits:
    """The same by a bit for each of two digits: two rounds, and counts of any size."""

    def __init__(self, ctx: Context, entries: Entries, places: int) -> None:
        self._shape = len(entries.counts), places
        self.mask = ctx.mask(self._shape, _kind(_longest(entries)))
        self._digits = _digits(_width(entries))
        count = self.mask.numel()
        self._tables = self._digits.deal(ctx, count, lambda: self.mask)
        self._bit_mask = ctx.mask_bits((count,))
        self._words = _EMPTY.deal(ctx, self._bit_mask, dtype=torch.int16)

    def count(self, ctx: Context, counts: torch.Tensor) -> Protocol:
        opened = yield from open_under(ctx, counts, self.mask)
        found = self._digits.look_up(opened.long().reshape(-1), self._tables)
        bits = yield from open_bits(ctx, found, self._bit_mask)
        if bits.is_meta:
            # Without torch's rules for sums, which take longer than all else here.
            return ghost(self._shape[:1], dtype=torch.int16)
        return _EMPTY.evaluate(bits, self._words).reshape(self._shape).sum(1, dtype=torch.int16)

    @staticmethod
    def cost(counts: int, entries: Entries) -> Cost:
        dealt = _digits(_width(entries)).dealt_bytes + 2 * _EMPTY.words
        opened = 2 * _kind(_longest(entries)).itemsize
        return Cost(2, (opened + 2) * counts, dealt * counts)


@cache
def _digits(width: int) -> Relations:
    """Whether both digits of a count are zero."""
    low = max(_NARROWEST, -(-width // 2))
    return Relations((low, max(_NARROWEST, width - low)), [(0, "equal"), (1, "equal")])


def _deal_one_hot(
    ctx: Context, mask: torch.Tensor, size: int, kind: torch.dtype
) -> torch.Tensor | None:
    """Shares of tables [n, size] that are one at each mask modulo `size` and zero elsewhere.

    size: a power of two. kind: the type of a word. None at the dealer.
    """

    def correct(share: torch.Tensor) -> torch.Tensor:
        _ONE_HOT(share.view(kind), mask.long().reshape(-1))
        return share

    table = ctx.deal_corrected((mask.numel(), size * kind.itemsize), correct)
    return None if table is None else table.view(kind)


def _one_hot_host(share: torch.Tensor, places: torch.Tensor) -> None:
    """Turn the client's share [n, N] of tables that are one at these places into the server's."""
    _subtract_from_one_hot(places.numpy(), share.numpy())


def _one_hot_tensors(share: torch.Tensor, places: torch.Tensor) -> None:
    # No access depends on a place, which is secret.
    column = torch.arange(share.shape[1], device=share.device)
    share.neg_().add_(column == (places & (share.shape[1] - 1))[:, None])


def _tallied_host(
    tables: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """Sums of tables [n, N], each read from its place on downwards, over rows: `shape`."""
    out = torch.zeros(shape, dtype=tables.dtype)
    _tally(tables.numpy(), places.numpy(), rows.numpy(), out.numpy())
    return out


def _tallied_tensors(
    tables: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    back = torch.arange(shape[1], device=tables.device)
    total = torch.zeros(shape, dtype=torch.int32, device=tables.device)
    size = max(1, _INDICES // shape[1])
    for first in range(0, len(tables), size):
        piece = slice(first, first + size)
        index = (places[piece, None] - back) & (tables.shape[1] - 1)
        total.index_add_(0, rows[piece], tables[piece].gather(1, index).int())
    return total.to(tables.dtype)


_ONE_HOT = Kernel("slots.one_hot", _one_hot_host, _one_hot_tensors)
_TALLIED = Kernel("slots.tallied", _tallied_host, _tallied_tensors)


@compiled()
def _subtract_from_one_hot(places, share):  # type: ignore[no-untyped-def]
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
