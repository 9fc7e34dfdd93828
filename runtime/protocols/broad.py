"""Exponentials in one round: a table of two broad windows, in a ring that is wide enough.

With z = x + r open, exp(x) = exp(x0) exp(y): what x0 is for each value of the upper bits of z the
dealer knows, and y, the lower bits, is public (`pieces`). There the product of two rounded numbers
fills a word of 64 bits, so it takes a second opening to truncate it, and windows reach so little
that what lies below the table has to be compared away. Here the dealt words have as many bits as it
takes. Shares of exp(x0) modulo 2**(64 + d), times exp(y), are shares of the value with d bits more
than asked for. Each party drops these from its own share, and what is left are shares modulo 2**64
(`truncate`, into a smaller ring), without a message. And a word with a few hundred bits holds an
exponential of any size, so two windows cover all that a row can spread, and nothing is compared.

Two are enough for a range as long as one of them, S. Let i and y be the window of z - start and
the place in it, and j and r' those of r, so that x - start = (i - j) S + (y - r'). The left side is
in [0, S], and y - r' is above -S and below S. So (i - j) S is above -S and below 2 S: i - j is 0
or 1, and two entries, one for each, are all that a party may have to read.

exp(y) is a mantissa times a power of two, and public, so a party multiplies its word by few bits
and reads 64 bits of the product. Or it reads as many bits as the sum of a row's exponentials may
have, wherever the row lies (`broad_sums`): then nothing has to be known of the row's maximum.
Sources: one-time truth tables (Ishai et al., TCC 2013); that
dropping bits of shares truncates them in a smaller ring, see docs/protocols.md.
"""

from __future__ import annotations

import decimal
import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import CLIENT, FRACTIONAL_BITS, RING_BITS, Cost
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.long import HALF_BITS, ONES, added, carried
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.opening import Cut

_WINDOWS = 2

_FACTOR_FRAC = 30
_MANTISSA_FRAC = 23
"""A mantissa has three bits before the point at most."""

_GUARD_BITS = 26
"""Rounding exp(x0) costs at most 2**-27, whatever exp(y) is."""

_DIGIT_BITS = 8
_TOGETHER = 1 << 12
"""Elements whose tables exist at once; what is dealt does not depend on it."""


@dataclass(frozen=True)
class Broad:
    """exp(x) for 2**16 x in [start, start + 2**step_bits], with `frac` fractional bits.

    reach: with n for it, the range is that of x in [top - 2**n - 2**-16, top - 2**-16]. top: an
    integer, which x does not reach. frac: fractional bits of the result. kept: bits of a result's
    share, a multiple of 32. Raises ValueError if a word would have to begin above its table.
    """

    reach: int
    top: int
    frac: int
    kept: int = RING_BITS

    def __post_init__(self) -> None:
        if not 0 < self.frac < _GUARD_BITS + _MANTISSA_FRAC or self.reach < 3:
            raise ValueError(f"no exponential has {self.frac} bits on windows of 2**{self.reach}")

    @property
    def step_bits(self) -> int:
        """A window has 2**step_bits units, and a unit is 2**-16."""
        return FRACTIONAL_BITS + self.reach

    @property
    def start(self) -> int:
        """Left end of the range in units."""
        return (self.top << FRACTIONAL_BITS) - 1 - ((_WINDOWS - 1) << self.step_bits)

    @property
    def word_frac(self) -> int:
        """Fractional bits of a dealt word."""
        return _GUARD_BITS + math.ceil((1 << self.reach) / math.log(2))

    @property
    def drop(self) -> int:
        """Bits that each party drops from its share of a product."""
        return self.word_frac + _MANTISSA_FRAC - self.frac

    @property
    def halves(self) -> int:
        """32-bit halves of a dealt word."""
        return -(-(self.kept + self.drop) // HALF_BITS)

    @property
    def dealt_bytes(self) -> int:
        """Bytes that the dealer sends to the server for one element."""
        return _WINDOWS * self.halves * HALF_BITS // 8

    @cached_property
    def first(self) -> int:
        """The integer that the table of powers begins with: below all places of windows."""
        return (self.start - (1 << self.step_bits)) >> FRACTIONAL_BITS

    def dealt_at(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The words of a table, as mantissas and what these are shifted up by, int64 [n, 2].

        mask: r, int32 [n].
        """
        r = mask.long()[:, None]
        entry = torch.arange(_WINDOWS, device=mask.device)
        window = (entry - (r >> self.step_bits)) & (_WINDOWS - 1)
        units = self.start + (window << self.step_bits) - (r & ((1 << self.step_bits) - 1))
        mantissa, exponent = _power_tensors(units, self)
        shift = self.word_frac - _MANTISSA_FRAC + exponent
        # A word that is shifted down is rounded; one far below a unit is zero.
        down = (-shift).clamp(0, RING_BITS - 2)
        return (mantissa + ((1 << down) >> 1)) >> down, shift.clamp(min=0)

    def read_at(self, opened: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which entry is read, what it is multiplied by, and at which bit a share begins, [n].

        opened: z, int32 [n].
        """
        point = opened.long() - self.start
        mantissa, exponent = _power_tensors(point & ((1 << self.step_bits) - 1), self)
        return (point >> self.step_bits) & (_WINDOWS - 1), mantissa, self.drop - exponent


def broad_exponentials(ctx: Context, x: Cut, table: Broad) -> Protocol:
    """Shares modulo 2**64 of exp(x) with `table.frac` fractional bits, [n].

    In: a window of x with 16 fractional bits, within the range of `table`. Error less than a unit
    of the last place, and 2**-23 of the value; a value far below a unit is 0 or one unit, at random
    with the right expectation. Outside of the range the result is another number.

    Rounds 1. Online 8 bytes per element; offline `table.dealt_bytes`, to the server alone. Each
    party sees z = x + r modulo 2**32, which is uniform because r is fresh and uniform there. The
    client is dealt nothing. What the server is sent are words minus words of the client's stream,
    modulo 2**(32 * `table.halves`): these are fresh, uniform and unknown to it, so what it sees is
    uniform, whatever r is. Both read the entry that z names, and drop bits of their own shares. The
    sum of two shares cut so is the value rounded down or one less, by the carry out of the bits
    that both dropped, and one unit is added; so roundings are fixed by bits of which each party
    knows its own (`rounding="public"`).
    """
    mask = x.mask(ctx)
    opened = yield from x.open(ctx, mask)
    narrow = x.narrow(mask)
    out = torch.empty(opened.shape, dtype=torch.int64, device=opened.device)
    for first in range(0, opened.numel(), _TOGETHER):
        piece = slice(first, first + _TOGETHER)
        _evaluate(ctx, opened[piece], narrow[piece], table, out[piece])
    return out


def broad_exponentials_cost(count: int, table: Broad) -> Cost:
    """Cost of `broad_exponentials` for `count` elements."""
    return Cost(1, 8 * count, table.dealt_bytes * count)


def broad_sums(
    ctx: Context, x: Cut, table: Broad, rows: torch.Tensor, counts: torch.Tensor
) -> Protocol:
    """Shares modulo 2**`table.kept` of sums of exponentials: int32 halves [R, kept / 32].

    In: a window of x as in `broad_exponentials`, [n]; the row of each, int64 [n] from 0 to R - 1;
    and how many entries rows have, int64 [R], at least 1. Each entry is off by less than a unit of
    the last place and by 2**-22 of its value. The sum must stay below 2**kept.

    Rounds, bytes and what each party sees: see `broad_exponentials`, of which this is the same but
    for the number of bits that are read. Sums are local.
    """
    mask = x.mask(ctx)
    opened = yield from x.open(ctx, mask)
    narrow, places = x.narrow(mask), to_device(rows, opened.device, "public")
    shape = len(counts), table.kept // HALF_BITS
    out = torch.zeros(shape, dtype=torch.int32, device=opened.device)
    for first in range(0, opened.numel(), _TOGETHER):
        piece = slice(first, first + _TOGETHER)
        dealt = _deal(ctx, narrow[piece], table)
        if dealt is not None and not opened.is_meta:
            _SUMS(dealt, opened[piece], places[piece], table, out)
    if opened.is_meta or ctx.party != CLIENT:
        return out
    # Both parties round down, so that each entry is a unit too small, on average.
    more = torch.zeros_like(out)
    more[:, 0] = to_device(counts, out.device, "public").to(torch.int32)
    return added(out, more)


def broad_sums_cost(count: int, table: Broad) -> Cost:
    """Cost of `broad_sums` for `count` elements in total."""
    return broad_exponentials_cost(count, table)


def _evaluate(
    ctx: Context, opened: torch.Tensor, mask: torch.Tensor, table: Broad, out: torch.Tensor
) -> None:
    dealt = _deal(ctx, mask, table)
    if dealt is None or opened.is_meta:
        return
    _VALUES(dealt, opened, table, out)
    out += ctx.public(torch.ones_like(out))


def _deal(ctx: Context, mask: torch.Tensor, table: Broad) -> torch.Tensor | None:
    """Shares of the tables for these masks [n], as int32 halves; None at the dealer."""

    def correct(share: torch.Tensor) -> torch.Tensor:
        _CORRECTED(share.view(torch.int32), mask, table)
        return share

    dealt = ctx.deal_corrected((mask.numel(), table.dealt_bytes), correct)
    return None if dealt is None else dealt.view(torch.int32)


@cache
def _powers(table: Broad, device: torch.device) -> tuple[torch.Tensor, ...]:
    """exp of integers from `first` on, as mantissas in [1, 2) and exponents; of both lower digits.

    Mantissas and digits have 30 fractional bits. Decimal arithmetic rounds alike on all machines,
    and both parties must come to the same words.
    """
    last = max(1 << table.reach, table.top) + 1
    with decimal.localcontext(prec=60):
        one, unit = decimal.Decimal(2), decimal.Decimal(2) ** -FRACTIONAL_BITS
        log = one.ln()
        exponents = [math.floor(k / log) for k in range(table.first, last)]
        wholes = [
            _integer((k - e * log).exp())
            for k, e in zip(range(table.first, last), exponents, strict=True)
        ]
        size = 1 << _DIGIT_BITS
        upper = [_integer((unit * i * size).exp()) for i in range(size)]
        lower = [_integer((unit * i).exp()) for i in range(size)]
    found = (torch.tensor(values) for values in (wholes, exponents, upper, lower))
    return tuple(to_device(values, device, "public") for values in found)


def _integer(value: decimal.Decimal) -> int:
    return int((value * 2**_FACTOR_FRAC).to_integral_value())


def _corrected_host(share: torch.Tensor, mask: torch.Tensor, table: Broad) -> None:
    """Turn the client's share of tables, int32 halves [n, 2 h], into the server's.

    mask: r, int32 [n].
    """
    tables = (each.numpy() for each in _powers(table, share.device))
    _deal_cpu(
        mask.numpy(), *tables, table.first, table.start, table.step_bits, table.word_frac,
        share.numpy().view("uint32").reshape(-1, _WINDOWS, table.halves),
    )  # fmt: skip


def _corrected_tensors(share: torch.Tensor, mask: torch.Tensor, table: Broad) -> None:
    words = share.view(-1, _WINDOWS, table.halves)
    mantissa, shift = table.dealt_at(mask)
    place, off = shift >> 5, shift & (HALF_BITS - 1)
    wide = mantissa << off
    parts = wide & ONES, (wide >> HALF_BITS) & ONES
    borrow = torch.zeros_like(wide)
    for half in range(table.halves):
        own = torch.where(place == half, parts[0], torch.where(place + 1 == half, parts[1], 0))
        left = own - (words[..., half].long() & ONES) - borrow
        words[..., half] = left.to(torch.int32)
        borrow = (left < 0).long()


def _values_host(
    dealt: torch.Tensor, opened: torch.Tensor, table: Broad, out: torch.Tensor
) -> None:
    """Write a party's shares, rounded down, to out [n], from its tables, int32 halves [n, 2 h]."""
    tables = (each.numpy() for each in _powers(table, dealt.device))
    _read_cpu(
        dealt.numpy().view("uint32").reshape(-1, _WINDOWS, table.halves), opened.numpy(), *tables,
        table.first, table.start, table.step_bits, table.drop, out.numpy(),
    )  # fmt: skip


def _values_tensors(
    dealt: torch.Tensor, opened: torch.Tensor, table: Broad, out: torch.Tensor
) -> None:
    wide, place = _product_tensors(dealt, opened, table)
    begin, off = place >> 5, place & (HALF_BITS - 1)
    low, middle, high = (wide.gather(1, (begin + k)[:, None])[:, 0] for k in range(3))
    found = (low >> off) | (middle << (HALF_BITS - off))
    out.copy_(found | torch.where(off > 0, high << (RING_BITS - off).clamp(max=63), 0))


def _product_tensors(
    dealt: torch.Tensor, opened: torch.Tensor, table: Broad
) -> tuple[torch.Tensor, torch.Tensor]:
    """A word times exp(y), in halves and one of zeros; and at which bit a share begins."""
    entry, mantissa, place = table.read_at(opened)
    words = dealt.view(-1, _WINDOWS, table.halves)
    words = words.gather(1, entry[:, None, None].expand(-1, 1, table.halves))[:, 0].long() & ONES
    products, carry = [], torch.zeros_like(mantissa)
    for half in range(table.halves):
        product = words[:, half] * mantissa + carry
        products.append(product & ONES)
        carry = product >> HALF_BITS
    return torch.stack([*products, torch.zeros_like(carry)], -1), place


def _sums_host(
    dealt: torch.Tensor, opened: torch.Tensor, rows: torch.Tensor, table: Broad, out: torch.Tensor
) -> None:
    """Add a party's shares, rounded down, to the rows of out, int32 halves [R, H]."""
    tables = (each.numpy() for each in _powers(table, dealt.device))
    _sum_cpu(
        dealt.numpy().view("uint32").reshape(-1, _WINDOWS, table.halves), opened.numpy(),
        rows.numpy(), *tables, table.first, table.start, table.step_bits, table.drop,
        out.numpy().view("uint32"),
    )  # fmt: skip


def _sums_tensors(
    dealt: torch.Tensor, opened: torch.Tensor, rows: torch.Tensor, table: Broad, out: torch.Tensor
) -> None:
    wide, place = _product_tensors(dealt, opened, table)
    begin, off = place >> 5, (place & (HALF_BITS - 1))[:, None]
    half = torch.arange(out.shape[1], device=out.device)
    # What is read beyond the word would be shifted out, and is read from the half of zeros.
    index = (begin[:, None] + half).clamp(max=table.halves)
    low = wide.gather(1, index) >> off
    high = wide.gather(1, (index + 1).clamp(max=table.halves)) << (HALF_BITS - off)
    total = out.long() & ONES
    total.index_add_(0, rows, low | (high & ONES))
    out.copy_(carried(total))


def _power_tensors(units: torch.Tensor, table: Broad) -> tuple[torch.Tensor, torch.Tensor]:
    """exp of numbers of units, as mantissas with 23 fractional bits and exponents."""
    wholes, exponents, upper, lower = _powers(table, units.device)
    whole, digit = (units >> FRACTIONAL_BITS) - table.first, (1 << _DIGIT_BITS) - 1
    found = (wholes[whole] * upper[(units >> _DIGIT_BITS) & digit]) >> _FACTOR_FRAC
    found = (found * lower[units & digit]) >> _FACTOR_FRAC
    drop = _FACTOR_FRAC - _MANTISSA_FRAC
    return (found + (1 << (drop - 1))) >> drop, exponents[whole]


_CORRECTED = Kernel("broad.corrected", _corrected_host, _corrected_tensors)
_VALUES = Kernel("broad.values", _values_host, _values_tensors)
_SUMS = Kernel("broad.sums", _sums_host, _sums_tensors)


@compiled(inline="always")
def _power(units, wholes, exponents, upper, lower, first):  # type: ignore[no-untyped-def]
    whole = (units >> FRACTIONAL_BITS) - first
    found = (wholes[whole] * upper[(units >> _DIGIT_BITS) & 255]) >> _FACTOR_FRAC
    found = (found * lower[units & 255]) >> _FACTOR_FRAC
    drop = _FACTOR_FRAC - _MANTISSA_FRAC
    return (found + (1 << (drop - 1))) >> drop, exponents[whole]


@compiled()
def _deal_cpu(mask, wholes, exponents, upper, lower, first, start, step_bits, frac, share):  # type: ignore[no-untyped-def]
    ones = (np.int64(1) << step_bits) - 1
    for i in range(mask.shape[0]):
        r = np.int64(mask[i])
        for entry in range(_WINDOWS):
            window = (entry - (r >> step_bits)) & (_WINDOWS - 1)
            units = start + (window << step_bits) - (r & ones)
            mantissa, exponent = _power(units, wholes, exponents, upper, lower, first)
            shift = frac - _MANTISSA_FRAC + exponent
            if shift < 0:
                # A word that is shifted down is rounded; one far below a unit is zero.
                down = min(-shift, 62)
                mantissa = (mantissa + ((np.int64(1) << down) >> 1)) >> down
                shift = 0
            place, wide = shift >> 5, np.uint64(mantissa) << np.uint64(shift & 31)
            word, borrow = share[i, entry], np.int64(0)
            for half in range(word.shape[0]):
                own = np.int64(0)
                if half == place:
                    own = np.int64(wide & np.uint64(ONES))
                elif half == place + 1:
                    own = np.int64(wide >> np.uint64(32))
                left = own - np.int64(word[half]) - borrow
                word[half] = np.uint32(left & ONES)
                borrow = np.int64(left < 0)


@compiled()
def _read_cpu(  # type: ignore[no-untyped-def]
    dealt, opened, wholes, exponents, upper, lower, first, start, step_bits, drop, out
):
    ones = (np.int64(1) << step_bits) - 1
    for i in range(opened.shape[0]):
        point = np.int64(opened[i]) - start
        word = dealt[i, (point >> step_bits) & (_WINDOWS - 1)]
        mantissa, exponent = _power(point & ones, wholes, exponents, upper, lower, first)
        place = drop - exponent
        begin, off = place >> 5, np.uint64(place & 31)
        low = middle = high = carry = np.uint64(0)
        for half in range(min(begin + 3, word.shape[0])):
            product = np.uint64(word[half]) * np.uint64(mantissa) + carry
            carry = product >> np.uint64(32)
            product &= np.uint64(ONES)
            if half == begin:
                low = product
            elif half == begin + 1:
                middle = product
            elif half == begin + 2:
                high = product
        found = (low >> off) | (middle << (np.uint64(32) - off))
        if off > 0:
            found |= high << (np.uint64(64) - off)
        out[i] = np.int64(found)


@compiled()
def _sum_cpu(  # type: ignore[no-untyped-def]
    dealt, opened, rows, wholes, exponents, upper, lower, first, start, step_bits, drop, out
):
    ones, halves = (np.int64(1) << step_bits) - 1, dealt.shape[2]
    wide = np.zeros(halves + 2, np.uint64)
    for i in range(opened.shape[0]):
        point = np.int64(opened[i]) - start
        word = dealt[i, (point >> step_bits) & (_WINDOWS - 1)]
        mantissa, exponent = _power(point & ones, wholes, exponents, upper, lower, first)
        carry = np.uint64(0)
        for half in range(halves):
            product = np.uint64(word[half]) * np.uint64(mantissa) + carry
            carry = product >> np.uint64(32)
            wide[half] = product & np.uint64(ONES)
        place, target = drop - exponent, out[rows[i]]
        begin, off, carry = place >> 5, np.uint64(place & 31), np.uint64(0)
        for half in range(target.shape[0]):
            part = wide[begin + half] >> off
            part |= (wide[begin + half + 1] << (np.uint64(32) - off)) & np.uint64(ONES)
            total = np.uint64(target[half]) + part + carry
            target[half] = np.uint32(total & np.uint64(ONES))
            carry = total >> np.uint64(32)
