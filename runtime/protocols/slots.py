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

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.correlations.prg import NUMPY
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.transfers import to_device, to_host
from mergec.runtime.protocols.digits import look_up
from mergec.runtime.protocols.formula import Formula, conjunction, open_bits
from mergec.runtime.protocols.histogram import from_first
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.peak import Entries, entries_of, from_integers, integer_parts

LONGEST = 255
"""Entries of a row that counters of eight bits can count."""

_SLOT_BITS = 1
_DIGIT_BITS = 8
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
    entries = entries_of(valid)
    rows, row, slots = len(entries.counts), entries.rows.numpy(), 1 << bits
    places, kind = slots // 2 - 1, _kind(entries)
    values, first = from_first(integer_parts(share, entries), entries.on(ctx.device))
    # The carry out of the lowest bit is lost, so that a slot may be one too low. The first entry's
    # share is zero at both parties, and its slot exact.
    values = values >> _SLOT_BITS if not values.is_meta else values
    mask = ctx.mask((len(row),), torch.int16)
    counters = ctx.deal_corrected(
        (len(row), slots * kind.itemsize),
        lambda s: _one_hot(mask, s.view(NUMPY[kind])).view(np.uint8),
    )
    zeros = (_Words if kind is torch.int8 else _Digits)(ctx, entries, places)
    opened = yield from open_under(ctx, values, mask)
    if counters is None:
        yield from zeros.count(ctx, zeros.mask.to("meta"))
        return from_integers(torch.empty(rows, dtype=torch.int16, device="meta"))
    words = counters.view(NUMPY[kind])
    counts = np.zeros((rows, slots // 2), words.dtype)
    _tally(words, to_host(opened, "host").long().numpy(), row, counts)
    # How many entries are in each slot but the lowest, or above it.
    above = np.cumsum(counts[:, ::-1], 1, words.dtype)[:, ::-1][:, 1:]
    mine = to_device(torch.from_numpy(np.ascontiguousarray(above)), share.device, "host")
    empty = yield from zeros.count(ctx, mine)
    top = ctx.public(torch.full((rows,), places)) - to_host(empty.long(), "host")
    top = to_device((top << _SLOT_BITS).to(torch.int16), share.device, "host")
    return from_integers(first + top)


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
        self._tables = ctx.deal_corrected(
            (self._shape[0] * places, 2 << _width(entries)),
            lambda s: _one_hot(self.mask, s.view(np.int16)).view(np.uint8),
        )

    def count(self, ctx: Context, counts: torch.Tensor) -> Protocol:
        """Shares modulo 2**16 of how many are zero, int16 [R], from shares of counts [R, P]."""
        opened = yield from open_under(ctx, counts, self.mask)
        if self._tables is None:
            return opened[:, 0].to(torch.int16)
        rows, places = self._shape
        found = np.zeros((rows, 1), np.int16)
        each = np.repeat(np.arange(rows), places)
        tables = self._tables.view(np.int16)
        _tally(tables, to_host(opened, "host").long().numpy().reshape(-1), each, found)
        return torch.from_numpy(found[:, 0])

    @staticmethod
    def cost(counts: int, width: int) -> Cost:
        return Cost(1, 2 * counts, (2 << width) * counts)


class _Digits:
    """The same for counts of more than eight bits, by a bit for each digit: two rounds."""

    def __init__(self, ctx: Context, entries: Entries, places: int) -> None:
        self._shape = len(entries.counts), places
        self.mask = ctx.mask(self._shape, torch.int16)
        self._sizes = _digit_bytes(_width(entries))
        count = self._shape[0] * places
        self._tables = ctx.deal_bits((count, sum(self._sizes)), self._equal)
        self._bit_mask = ctx.mask_bits((count,))
        self._words = _EMPTY.deal(ctx, self._bit_mask, dtype=torch.int16)

    def _equal(self) -> torch.Tensor:
        """For each digit of a mask one bit at its value, packed. Called by the dealer."""
        digits = to_host(self.mask, "host").long().numpy().reshape(-1)
        out = np.zeros((len(digits), sum(self._sizes)), np.uint8)
        every, first = np.arange(len(digits)), 0
        for size in self._sizes:
            digit = digits & (8 * size - 1)
            out[every, first + (digit >> 3)] = 1 << (digit & 7)
            digits, first = digits >> _DIGIT_BITS, first + size
        return to_device(torch.from_numpy(out), self.mask.device, "host")

    def count(self, ctx: Context, counts: torch.Tensor) -> Protocol:
        opened = yield from open_under(ctx, counts, self.mask)
        low, high = self._sizes
        places = np.array([(0, 8 * low - 1, 0), (_DIGIT_BITS, 8 * high - 1, low)])
        if opened.is_meta:
            found = self._bit_mask.to("meta")
        else:
            found = look_up(opened.long().reshape(-1), self._tables, places)
        bits = yield from open_bits(ctx, found, self._bit_mask)
        return _EMPTY.evaluate(bits, self._words).reshape(self._shape).sum(1, dtype=torch.int16)

    @staticmethod
    def cost(counts: int, width: int) -> Cost:
        dealt = sum(_digit_bytes(width)) + 2 * _EMPTY.words
        return Cost(2, 4 * counts + 2 * counts, dealt * counts)


def _digit_bytes(width: int) -> tuple[int, int]:
    """Bytes of the tables of a count's lower and upper digit."""
    return 1 << (_DIGIT_BITS - 3), 1 << max(0, width - _DIGIT_BITS - 3)


def _one_hot(mask: torch.Tensor, share: np.ndarray) -> np.ndarray:
    """The server's share of tables [n, N] that are one at each mask modulo N; N a power of two."""
    _subtract_one_hot(to_host(mask, "host").long().numpy().reshape(-1), share)
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
