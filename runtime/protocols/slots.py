"""The maximum of each row to within four units, by one histogram, for rows that spread little.

As in `histogram`, integer parts are taken relative to the row's first entry, so the largest is not
negative, and a row's maximum follows from how many entries are at a place or above. Here the rows
are known not to spread further than 2**bits, so that one histogram covers them, in slots of two
integers. It has few enough slots for its tables to be dealt entry by entry: the client's share of
each table is the next bytes of its own stream, and the server gets the rest. So are the tables that
tell which counts are zero. Nothing is dealt to the client. Sources: see `histogram`, and one-time
truth tables (Ishai et al., TCC 2013).
"""

from __future__ import annotations

from functools import cache

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.digits import Relations
from mergec.runtime.protocols.formula import Formula, conjunction, open_bits
from mergec.runtime.protocols.histogram import at_or_above, from_first
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.peak import Entries, entries_of, from_integers, integer_parts

LONGEST = 255
"""Entries of a row that counters of eight bits can count."""

_SLOT_BITS = 1
_DIGIT_BITS = 8
_INDICES = 1 << 24
"""Indices that exist at once on a device."""

_EMPTY = Formula(conjunction((0, 1)))
"""A count of more than eight bits is zero if both of its digits are."""


def top_slot(ctx: Context, share: torch.Tensor, valid: torch.Tensor, bits: int) -> Protocol:
    """Shares modulo 2**32 of a multiple of 2**16 in (m - 4 * 2**16, m] for each row's maximum m.

    In: int32 share [R, L], L < 2**15, with 16 fractional bits, whose differences are at most
    2**bits - 4 within a row; `valid`, public bool [R, L] with at least one True per row. Other
    entries are ignored. Out: [R]. Rows that spread further return another number.

    Rounds 2. With 2**w the power of two above the longest row's length, and P = 2**(bits - 1) - 1
    counts for each row, online 4 bytes per entry and 2 P per row; offline, to the server alone,
    2**bits bytes per entry and 2 * 2**w P per row. If a row has more than 255 entries, rounds 3,
    online 4 bytes per entry and 6 P per row, offline 2 * 2**bits bytes per entry and
    (40 + 2**(w - 11)) P per row, or 41 P if w is below 12: zero is found digit by digit.

    Each party sees slots, counts and bits, each under a fresh, uniform mask of its whole ring, used
    once. The server's tables are the differences to bytes of the client's stream, which are fresh,
    uniform and unknown to it. Of the first entry of a row, whose slot is zero, the mask is opened,
    which tells nothing.
    """
    entries = entries_of(valid).on(ctx.device)
    rows, row, slots = len(entries.counts), entries.rows, 1 << bits
    places, kind = slots // 2 - 1, _kind(entries)
    values, first = from_first(integer_parts(share, entries), entries)
    # The carry out of the lowest bit is lost, so that a slot may be one too low. The first entry's
    # share is zero at both parties, and its slot exact.
    values = values >> _SLOT_BITS if not values.is_meta else values
    mask = ctx.mask((len(row),), torch.int16)
    counters = _deal_one_hot(ctx, mask, slots, kind)
    zeros = (_Words if kind is torch.int8 else _Digits)(ctx, entries, places)
    opened = yield from open_under(ctx, values, mask)
    if counters is None:
        yield from zeros.count(ctx, zeros.mask.to("meta"))
        return from_integers(torch.empty(rows, dtype=torch.int16, device="meta"))
    counts = _TALLIED(counters, opened.long(), row, (rows, slots // 2))
    # How many entries are in each slot but the lowest, or above it.
    empty = yield from zeros.count(ctx, at_or_above(counts, 1))
    top = ctx.public(torch.full((rows,), places, device=share.device)) - empty.long()
    return from_integers(first + (top << _SLOT_BITS).to(torch.int16))


def top_slot_cost(valid: torch.Tensor, bits: int) -> Cost:
    """Cost of `top_slot` for rows with these valid entries."""
    entries = entries_of(valid)
    rows, count, kind = len(entries.counts), len(entries.rows), _kind(entries)
    places = (1 << bits) // 2 - 1
    zeros = (_Words if kind is torch.int8 else _Digits).cost(rows * places, _width(entries))
    return Cost(1, 4 * count, (kind.itemsize << bits) * count) + zeros


def _width(entries: Entries) -> int:
    """Bits of the largest count."""
    return int(entries.counts.max()).bit_length()


def _kind(entries: Entries) -> torch.dtype:
    """The type of a counter."""
    return torch.int8 if int(entries.counts.max()) <= LONGEST else torch.int16


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
    def cost(counts: int, width: int) -> Cost:
        return Cost(1, 2 * counts, (2 << width) * counts)


class _Digits:
    """The same for counts of more than eight bits, by a bit for each digit: two rounds."""

    def __init__(self, ctx: Context, entries: Entries, places: int) -> None:
        self._shape = len(entries.counts), places
        self.mask = ctx.mask(self._shape, torch.int16)
        self._digits = _digits(_width(entries))
        count = self.mask.numel()
        self._tables = self._digits.deal(ctx, count, lambda: self.mask)
        self._bit_mask = ctx.mask_bits((count,))
        self._words = _EMPTY.deal(ctx, self._bit_mask, dtype=torch.int16)

    def count(self, ctx: Context, counts: torch.Tensor) -> Protocol:
        opened = yield from open_under(ctx, counts, self.mask)
        found = self._digits.look_up(opened.long().reshape(-1), self._tables)
        bits = yield from open_bits(ctx, found, self._bit_mask)
        return _EMPTY.evaluate(bits, self._words).reshape(self._shape).sum(1, dtype=torch.int16)

    @staticmethod
    def cost(counts: int, width: int) -> Cost:
        dealt = _digits(width).dealt_bytes + 2 * _EMPTY.words
        return Cost(2, 4 * counts + 2 * counts, dealt * counts)


@cache
def _digits(width: int) -> Relations:
    """Whether both digits of a count are zero. A table of less than three bits fills no byte."""
    return Relations((_DIGIT_BITS, max(3, width - _DIGIT_BITS)), [(0, "equal"), (1, "equal")])


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
