"""Division of rows by a power of a number of their own, with a single opening of the row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import (
    CLIENT,
    FRACTIONAL_BITS,
    HEADROOM_BITS,
    RING_BITS,
    Cost,
)
from mergec.runtime.core.values import Wide, logical_shift
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import integers, to_device
from mergec.runtime.protocols.columns import groups
from mergec.runtime.protocols.compare import WINDOW_BITS
from mergec.runtime.protocols.octave import MAX_EXPONENT
from mergec.runtime.protocols.opening import Cut, open_high, open_under
from mergec.runtime.protocols.power import (
    COLUMN_BITS,
    TABLE_FRAC,
    Power,
    octaves,
    octaves_cost,
    rounded_octaves,
    rounded_octaves_cost,
)
from mergec.runtime.protocols.squares import (
    deal_square,
    square_share,
    truncated_square,
    truncated_square_cost,
)
from mergec.runtime.protocols.truncate import (
    NARROW_OFFSET,
    OFFSET,
    Truncation,
    base_of,
    top_bit,
    truncate,
    truncation_words,
    window_of_zeros,
    wrap_of,
)
from mergec.runtime.protocols.wide import Factors, fits_wide, scaled_wide, scaled_wide_cost

DEFAULT_BOUND = 2.0**14
"""Largest mean square of a row, used if calibration provides none."""

SCALED_FRAC = 2 * FRACTIONAL_BITS
"""Fractional bits of scaled rows: 16 of the row at its new size, plus 16 of a mantissa.
"""


@dataclass
class Row:
    """Rows [R, d] opened as z = x + 2**62 + r, so that x >> s can be formed for every s.

    opened: z. mask: this party's share of r; the dealer has r itself. top: shares of msb(r). shift:
    with exact rounding, the only s.
    """

    opened: torch.Tensor
    mask: torch.Tensor
    top: torch.Tensor
    shift: int = 0


def open_row(
    ctx: Context, share: torch.Tensor, frac: int, spec: Power, largest: int = 14
) -> Protocol:
    """Open rows with |x| < 2**62 and `frac` fractional bits for `scale_rows` with `spec`.

    largest: with exact rounding, the scaled rows are below 2**largest.

    Rounds 1, online 16 bytes per element, offline 8. Each party sees z, which is uniform because r
    is fresh and uniform; with exact rounding, what it sees in `open_high`.
    """
    mask = ctx.mask(share.shape)
    top = ctx.deal(share.shape, lambda: top_bit(mask))
    # Rows of the first column, which are scaled up most, keep 16 fractional bits, unless the result
    # would not fit into the ring.
    room = HEADROOM_BITS - 1 - largest - _whole_frac(spec)
    shift = max(0, frac - FRACTIONAL_BITS - spec.first_exponent, frac - room)
    opened = yield from open_high(ctx, share, mask, shift, OFFSET)
    return Row(opened, mask, top, shift)


def open_row_cost(count: int) -> Cost:
    """Cost of `open_row` for `count` elements in total."""
    return Cost(rounds=1, online=16 * count, offline=8 * count)


@dataclass
class Factor:
    """Factors of rows, [R, columns], as they are opened: base - low + wrap * top, modulo 2**64.

    base, wrap: public. low, top: shares. words: called by the dealer, returns low and top
    themselves. wrap and top have no columns if the factors are opened modulo 2**64, where nothing
    depends on whether they wrap around.
    """

    base: torch.Tensor
    wrap: torch.Tensor
    low: torch.Tensor
    top: torch.Tensor
    words: Callable[[], tuple[torch.Tensor, torch.Tensor]]

    @property
    def wraps(self) -> bool:
        """Whether there are wrap and top."""
        return self.wrap.shape[-1] > 0


def open_whole_factor(ctx: Context, found: torch.Tensor) -> Protocol:
    """Open mantissas with the fractional bits that they have, [R, columns], as a `Factor`.

    Rounds 1, online 16 bytes per mantissa, offline none. Each party sees each mantissa under a mask
    that is fresh and uniform modulo 2**64.
    """
    mask = ctx.mask(found.shape)
    opened = yield from open_under(ctx, found, mask)
    return Factor(opened, opened[:, :0], mask, mask[:, :0], lambda: (mask, mask[:, :0]))


def open_factor(ctx: Context, found: torch.Tensor) -> Protocol:
    """Open the mantissas that `octaves` found, [R, columns], as a `Factor` with 16 fractional bits.

    A mantissa is truncated as it is opened, and products with it are formed from this opening. A
    mantissa that is zero stays exactly zero. Rounds 1, with exact rounding 2. Online 8 bytes per
    mantissa, offline 16. Each party sees the upper 32 bits of each mantissa under a mask that is
    fresh and uniform modulo 2**32; with exact rounding, what it sees in `open_high`.
    """
    if ctx.exact:
        value = Cut(found, WINDOW_BITS, WINDOW_BITS + _FACTOR_SHIFT)
    else:
        value = Cut(window_of_zeros(ctx, found))
    wide = value.mask(ctx)
    mask = value.narrow(wide).reshape(found.shape)

    def words() -> torch.Tensor:
        return truncation_words(mask, _FACTOR_SHIFT)

    low, top = ctx.deal((2, *mask.shape), words)
    opened = yield from value.open(ctx, wide, NARROW_OFFSET)
    if opened.is_meta:
        return Factor(low, low, low, top, lambda: tuple(words()))
    parts = Truncation(opened.reshape(found.shape), _FACTOR_SHIFT)
    return Factor(parts.base, parts.wrap, low, top, lambda: tuple(words()))


def open_factor_cost(spec: Power, rows: int) -> Cost:
    """Cost of `open_factor` for that many rows."""
    count = rows * spec.octaves.columns
    return Cost(rounds=1, online=8 * count, offline=16 * count)


def row_factor(ctx: Context, share: torch.Tensor, spec: Power) -> Protocol:
    """The `Factor` of rows with the numbers V [R], which `scale_rows` takes. Rounds 2.

    `rounded_octaves`, then `open_whole_factor`: more bytes for each row than `row_factor_wide`,
    and half of them for each element that `scale_rows` scales. With exact rounding it is that.
    """
    if ctx.exact:
        return (yield from row_factor_wide(ctx, share, spec))
    found = yield from rounded_octaves(ctx, share, spec, FRACTIONAL_BITS)
    return (yield from open_whole_factor(ctx, found))


def row_factor_cost(spec: Power, rows: int) -> Cost:
    """Cost of `row_factor` for that many rows."""
    opened = Cost(rounds=1, online=16 * rows * spec.octaves.columns)
    return rounded_octaves_cost(spec, rows) + opened


def row_factor_wide(ctx: Context, share: torch.Tensor, spec: Power) -> Protocol:
    """The `Factor` as an integer, not only modulo 2**64, as `scale_rows_wide` needs it. Rounds 2.

    `octaves`, then `open_factor`.
    """
    found = yield from octaves(ctx, share, spec)
    return (yield from open_factor(ctx, found))


def row_factor_wide_cost(spec: Power, rows: int) -> Cost:
    """Cost of `row_factor_wide` for that many rows."""
    return octaves_cost(spec, rows) + open_factor_cost(spec, rows)


def scale_rows(
    ctx: Context, row: Row, frac: int, factor: Factor, spec: Power, finer: int = 0
) -> Protocol:
    """Shares of the rows times the power of V that `octaves` found: [R, d].

    In: rows with `frac` fractional bits; `factor` from `row_factor`. Out: 32 fractional bits and
    `finer`. Column c needs the row times
    2**(first_exponent - COLUMN_BITS c), that is x >> s_c, a public linear combination of dealt
    words from the row's opening. The mantissa is one from its own opening, so their product is one
    of the products of these words. All mantissas but one are zero, so the sum over c is the result.
    The full input range is supported, and only the remaining bits are rounded, at random: the error
    is two units of 2**-16 of the result, plus at most 2**-14 relative from the mantissa. Rounds 0,
    online 0 bytes. Offline per element 16 bytes, plus 8 for each column that shifts down; if the
    factor has wraps, 8 for each column, and 2 to 8 more for each that shifts down so far that both
    of its wraps matter.
    With `finer` > 0 columns form bands that shift down alike, and so need one word for that: a row
    is rounded for the first column of its band, and the surplus bits of the others stay in the
    result.

    With exact rounding the bits that a column rounds off may not be those that another one needs.
    So the row is rounded once, for the first column (`open_high`), and multiplied by the power
    itself, the sum over the columns; the surplus bits are truncated. Rounds 2, and one more for the
    row; `finer` is not used. Where two columns share a number the mantissa's error is up to 2**-13
    relative.
    """
    shifts, weights = _whole(row.shift, spec) if ctx.exact else _shifts(frac, spec, finer)
    near, far, kind = _word_counts(shifts, factor.wraps)
    rows, size = row.opened.shape

    def secret() -> torch.Tensor:
        low, top = factor.words()
        words: torch.Tensor = _WORDS(row.mask, low * _on(weights, low), top, shifts)
        return words

    def tops() -> torch.Tensor:
        last = factor.words()[1][:, len(shifts) - far :]
        return top_bit(row.mask)[..., None] * last[:, None]

    dealt = ctx.deal((rows, size, sum(near)), secret)
    both = ctx.deal((rows, size, far), tops, kind) if far else dealt[..., :0]
    if row.opened.is_meta:
        scaled = row.opened
    else:
        times = _on(weights, factor.base)
        scaled = _SCALED(
            row.opened, row.mask, row.top, factor.base * times,
            factor.wrap * times if factor.wraps else factor.wrap, factor.low * times, factor.top,
            dealt, both, shifts, ctx.party == CLIENT,
        )  # fmt: skip
    if ctx.exact:
        whole = frac - row.shift + _whole_frac(spec)
        scaled = yield from truncate(ctx, scaled, whole - SCALED_FRAC)
    return scaled


def scale_rows_wide(
    ctx: Context,
    opened: torch.Tensor,
    mask: torch.Tensor,
    frac: int,
    factor: Factor,
    spec: Power,
    finer: int = 0,
) -> Wide:
    """`scale_rows` of rows that were opened as z under a mask, in shares modulo 2**128.

    In: a factor from `row_factor_wide`. The result is the same, with as many fractional bits, of
    which each party may then drop any number (`wide.narrow`). Not for exact rounding; see
    `fits_wide_rows`. Rounds 0, online 0 bytes; offline: `scaled_wide_cost`. What the parties see:
    `scaled_wide`.
    """
    shifts, weights = _shifts(frac, spec, finer)

    def words() -> tuple[torch.Tensor, torch.Tensor]:
        low, top = factor.words()
        return low * _on(weights, low), top

    base, wrap = factor.base, factor.wrap
    if not base.is_meta:
        times = _on(weights, base)
        base, wrap = base * times, wrap * times
    halves = scaled_wide(ctx, opened, mask, Factors(base, wrap, words), shifts.tolist())
    return Wide(*halves, SCALED_FRAC + finer)


def scale_rows_wide_cost(frac: int, spec: Power, rows: int, size: int, finer: int = 0) -> Cost:
    """Cost of `scale_rows_wide` for `rows` rows of `size` elements."""
    return scaled_wide_cost(_shifts(frac, spec, finer)[0].tolist(), rows, size)


def fits_wide_rows(frac: int, spec: Power, finer: int = 0) -> bool:
    """Whether `scale_rows_wide` can scale rows with `frac` fractional bits."""
    return fits_wide(_shifts(frac, spec, finer)[0].tolist())


def _on(weights: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Weights of mantissas where these words are."""
    return integers(tuple(weights.tolist()), like.device)


def _split(
    words: np.ndarray, shifts: np.ndarray, wraps: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    down, topped, _ = _word_counts(shifts, wraps)[0]
    rest = words[..., down:]
    return words[..., :down], rest[..., :topped], rest[..., topped:]


def _words_host(
    mask: torch.Tensor, low: torch.Tensor, top: torch.Tensor, shifts: np.ndarray
) -> torch.Tensor:
    wraps = top.shape[1] > 0
    words = np.empty((*mask.shape, sum(_word_counts(shifts, wraps)[0])), np.int64)
    _deal_cpu(mask.numpy(), low.numpy(), top.numpy(), shifts, *_split(words, shifts, wraps))
    return torch.from_numpy(words)


def _words_tensors(
    mask: torch.Tensor, low: torch.Tensor, top: torch.Tensor, shifts: np.ndarray
) -> torch.Tensor:
    tops, down, topped, last = top_bit(mask), [], [], 0
    total, wrapped = torch.zeros_like(mask), torch.zeros_like(mask)
    for k, s in enumerate(shifts.tolist()):
        factor = low[:, k, None]
        part = logical_shift(mask, s) if s > 0 else mask << -s
        if s > 0:
            if s != last:
                down.append(part)
            wrapped += factor << (RING_BITS - s)
        last = s
        total += part * factor
        if top.shape[1]:
            topped.append(part * top[:, k, None])
    return torch.stack([*down, *topped, total, tops * wrapped], -1)


def _scaled_host(
    opened: torch.Tensor,
    mask: torch.Tensor,
    top: torch.Tensor,
    base: torch.Tensor,
    wrap: torch.Tensor,
    low: torch.Tensor,
    factor_top: torch.Tensor,
    dealt: torch.Tensor,
    both: torch.Tensor,
    shifts: np.ndarray,
    at_client: bool,
) -> torch.Tensor:
    out = torch.empty(opened.shape, dtype=torch.int64)
    words = (each.numpy() for each in (opened, mask, top, base, wrap, low, factor_top))
    parts = _split(dealt.numpy(), shifts, wrap.shape[1] > 0)
    _scale_cpu(*words, *parts, both.long().numpy(), shifts, at_client, out.numpy())
    return out


def _scaled_tensors(
    opened: torch.Tensor,
    mask: torch.Tensor,
    top: torch.Tensor,
    base: torch.Tensor,
    wrap: torch.Tensor,
    low: torch.Tensor,
    factor_top: torch.Tensor,
    dealt: torch.Tensor,
    both: torch.Tensor,
    shifts: np.ndarray,
    at_client: bool,
) -> torch.Tensor:
    wrapped = wrap.shape[1] > 0
    near, far, _ = _word_counts(shifts, wrapped)
    down, topped, crossed = dealt.split(near, 2)
    share = (base if at_client else 0) - low
    if wrapped:
        share = share + wrap * factor_top
    total, wraps = crossed[..., 0].clone(), torch.zeros_like(opened)
    number, last = -1, 0
    for k, s in enumerate(shifts.tolist()):
        public = base[:, k, None]
        if s > 0:
            number += s != last
            x, r = logical_shift(opened, s) - (1 << (RING_BITS - 2 - s)), down[..., number]
            wraps += (public << (RING_BITS - s)) * top
        else:
            x, r = (opened - (1 << (RING_BITS - 2))) << -s, mask << -s
        last = s
        total += x * share[:, k, None] - r * public
        if wrapped:
            total -= topped[..., k] * wrap[:, k, None]
        place = k - len(shifts) + far
        if place >= 0:
            wraps += (wrap[:, k, None] << (RING_BITS - s)) * both[..., place].long()
    return total + (opened >= 0) * (wraps - crossed[..., 1])


_WORDS = Kernel("normalize.words", _words_host, _words_tensors)
_SCALED = Kernel("elements.scaled", _scaled_host, _scaled_tensors)


def _whole_frac(spec: Power) -> int:
    """Fractional bits of a power as the sum of its columns."""
    return FRACTIONAL_BITS - spec.first_exponent + COLUMN_BITS * (spec.octaves.columns - 1)


_FACTOR_SHIFT = TABLE_FRAC - FRACTIONAL_BITS - WINDOW_BITS
"""Bits of a mantissa's upper half that are rounded off when it is opened."""

_WRAP_BITS = WINDOW_BITS - _FACTOR_SHIFT
"""Where a mantissa wraps around in its opening it is off by 2**20 units."""


def _word_counts(shifts: np.ndarray, wraps: bool) -> tuple[tuple[int, int, int], int, torch.dtype]:
    """Dealt words per element of a row: those of `_deal_cpu`; products of top bits; their type.

    wraps: whether the factor has any. Where both a row, shifted down by s, and its factor wrap
    around, the product is off by 2**(84 - s). For s <= 20 that is zero modulo 2**64, and else only
    s - 20 bits of the product of the top bits matter.
    """
    return _counts(tuple(shifts.tolist()), wraps)


@cache
def _counts(shifts: tuple[int, ...], wraps: bool) -> tuple[tuple[int, int, int], int, torch.dtype]:
    down = len({s for s in shifts if s > 0})
    if not wraps:
        return (down, 0, 2), 0, torch.int64
    bits = shifts[-1] - _WRAP_BITS
    kind = torch.int16 if bits <= 16 else torch.int32 if bits <= WINDOW_BITS else torch.int64
    return (down, len(shifts), 2), sum(s > _WRAP_BITS for s in shifts), kind


@compiled()
def _deal_cpu(mask, factor_low, factor_top, shifts, low, topped, crossed):  # type: ignore[no-untyped-def]
    """Dealer's words, from the masks r [R, d] of rows and the words l, t [R, C] of their factors.

    With p = r >> s for each of the C columns: low: p for each s > 0, once where neighbours have the
    same. topped: p t, if there are any t. crossed: the sum of p l over all columns, and msb(r)
    times the sum of 2**(64 - s) l over those with s > 0.
    """
    for i in range(mask.shape[0]):
        for e in range(mask.shape[1]):
            r = np.uint64(mask[i, e])
            top = np.int64(r >> np.uint64(63))
            total, wrapped, down = np.int64(0), np.int64(0), -1
            for k in range(shifts.shape[0]):
                s, factor = shifts[k], factor_low[i, k]
                if s > 0:
                    part = np.int64(r >> np.uint64(s))
                    down += k == 0 or s != shifts[k - 1]
                    low[i, e, down] = part
                    wrapped += factor << (64 - s)
                else:
                    part = np.int64(r << np.uint64(-s))
                total += part * factor
                if topped.shape[2] > 0:
                    topped[i, e, k] = part * factor_top[i, k]
            crossed[i, e, 0] = total
            crossed[i, e, 1] = top * wrapped


@compiled()
def _scale_cpu(  # type: ignore[no-untyped-def]
    opened, mask, top, base, wrap, factor_low, factor_top, low, topped, crossed, both, shifts,
    at_client, out,
):  # fmt: skip
    columns, wraps = shifts.shape[0], wrap.shape[1] > 0
    share = np.empty(columns, np.int64)
    for i in range(opened.shape[0]):
        row_wrap = np.int64(0)
        for k in range(columns):
            share[k] = (base[i, k] if at_client else 0) - factor_low[i, k]
            if wraps:
                share[k] += wrap[i, k] * factor_top[i, k]
            if shifts[k] > 0:
                row_wrap += wrap_of(0, shifts[k], RING_BITS) * base[i, k]
        for e in range(opened.shape[1]):
            z = opened[i, e]
            total, down, far, both_wrap = crossed[i, e, 0], -1, 0, np.int64(0)
            for k in range(columns):
                s = shifts[k]
                if s > 0:
                    down += k == 0 or s != shifts[k - 1]
                    total += base_of(z, s, RING_BITS) * share[k] - low[i, e, down] * base[i, k]
                else:
                    x = (z - (np.int64(1) << 62)) << -s
                    total += x * share[k] - (mask[i, e] << -s) * base[i, k]
                if not wraps:
                    continue
                total -= topped[i, e, k] * wrap[i, k]
                if s > _WRAP_BITS:
                    both_wrap += wrap_of(0, s, RING_BITS) * wrap[i, k] * both[i, e, far]
                    far += 1
            no_top = np.int64(z >= 0)
            out[i, e] = total + no_top * (row_wrap * top[i, e] - crossed[i, e, 1] + both_wrap)


def scale_rows_cost(frac: int, spec: Power, rows: int, size: int, finer: int = 0) -> Cost:
    """Cost of `scale_rows` for `rows` rows of `size` elements."""
    near, far, kind = _word_counts(_shifts(frac, spec, finer)[0], wraps=False)
    return Cost(offline=(8 * sum(near) + kind.itemsize * far) * rows * size)


@cache
def _shifts(frac: int, spec: Power, finer: int) -> tuple[np.ndarray, np.ndarray]:
    """Right shift of the rows in each column, which is that of its band; its mantissa's weight."""
    first = frac - FRACTIONAL_BITS - spec.first_exponent
    columns = np.arange(spec.octaves.columns)
    starts = columns - columns % (finer // COLUMN_BITS + 1)
    shifts = np.minimum(first + COLUMN_BITS * starts, HEADROOM_BITS)
    return shifts, 1 << (finer - COLUMN_BITS * (columns - starts))


@cache
def _whole(shift: int, spec: Power) -> tuple[np.ndarray, np.ndarray]:
    """The same if rows are multiplied by the power itself: one shift, and weights of mantissas."""
    columns = np.arange(spec.octaves.columns)
    return np.full_like(columns, shift), 1 << COLUMN_BITS * columns[::-1]


@dataclass(frozen=True)
class RowNorm:
    """The scales of a row normalization, all derived from public numbers.

    size: row length d. frac: fractional bits of the rows; any real number, so that rows scaled by a
    constant cost nothing extra. eps: added to the mean square. bound: largest mean square.
    """

    size: int
    frac: float
    eps: float
    bound: float

    @cached_property
    def square_shift(self) -> int:
        """Bits dropped before squaring, so that the sum of squares, and eps, stay within 2**53."""
        largest = max(self.bound or DEFAULT_BOUND, self.eps)
        room = (MAX_EXPONENT - math.log2(self.size * largest)) / 2
        return max(0, math.ceil(self.frac - room))

    @cached_property
    def eps_units(self) -> int:
        """eps on the scale of the sum of squares."""
        return round(self.eps * self.size * 2.0 ** (2 * (self.frac - self.square_shift)))

    @property
    def largest(self) -> int:
        """Bits of a normalized row's largest entry, which is at most sqrt(d)."""
        return math.ceil(math.log2(self.size) / 2) + 1

    @property
    def inverse_root(self) -> Power:
        """The power that maps the sum of squares to the row's factor."""
        return _inverse_root(self)


@cache
def _inverse_root(norm: RowNorm) -> Power:
    """Cached: norms are created anew in every step, but the layout of their lookups is the same."""
    squares = 2 * (norm.frac - norm.square_shift) + math.log2(norm.size)
    # If `frac` is not an integer, the factor applies its fractional part.
    surplus = norm.frac - math.floor(norm.frac)
    low = max(0, math.floor(math.log2(max(1, norm.eps_units))))
    low = min(low, MAX_EXPONENT - 1)
    return Power(-0.5, squares - 2 * surplus, low, MAX_EXPONENT)


def normalize(
    ctx: Context, share: torch.Tensor, spec: RowNorm, parts: Sequence[int] = ()
) -> Protocol:
    """Shares of x / sqrt(mean(x**2) + eps) for each row, with 32 fractional bits.

    In: additive share [..., d] of rows with |x| < 2**62 and mean square at most `bound`. Beyond the
    bound the result is wrong, but finite. Rounds 3. The row is opened once, as z = x + 2**62 + r,
    both for its squares (`deal_square`) and for `scale_rows`. Online 16 bytes per element, plus
    those of `row_factor`, which are per row. Offline 32 bytes per element, plus those of
    `row_factor` and of `scale_rows`. Each party sees z, which is uniform because r is fresh and
    uniform, and what it sees in `row_factor`. With exact rounding the row is opened twice, as
    squares round off other bits than the scaled row: rounds 8.

    parts: columns whose words stand for numbers that are larger by powers of two, as (columns,
    exponent, columns, exponent, ...), for rows of which `spec.frac` is an integer. Columns of each
    exponent are shifted by their own number of bits, and are otherwise opened, squared and scaled
    as any others, by one opening of the mantissas.
    """
    rows, root = share.reshape(-1, share.shape[-1]), spec.inverse_root
    blocks = blocks_of(spec, parts)
    opened = yield from together(*(_open_block(ctx, rows, spec, block) for block in blocks))
    total = total_of([squares for squares, _ in opened])
    if ctx.party == CLIENT:
        total += spec.eps_units
    factor = yield from row_factor(ctx, total, root)
    scaled = yield from together(
        *(
            scale_rows(ctx, row, block.frac, factor, root)
            for (_, row), block in zip(opened, blocks, strict=True)
        )
    )
    return in_order(scaled, blocks).reshape(share.shape)


@dataclass(frozen=True, eq=False)
class Block:
    """Columns of one exponent, of rows of `size` columns.

    lift: bits by which their words are shifted up at first. frac, square_shift: the fractional bits
    that they have then, and how many of them are dropped before squaring.
    """

    columns: torch.Tensor
    size: int
    lift: int
    frac: int
    square_shift: int

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The words of these columns, shifted up."""
        if len(self.columns) < self.size:
            columns = to_device(self.columns, rows.device, "public")
            rows = rows[:, : len(self.columns)] if rows.is_meta else rows[:, columns]
        return rows << self.lift if self.lift and not rows.is_meta else rows


def total_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum over each row [R] of all columns, which are in these parts [R, columns]."""
    if parts[0].is_meta:
        return parts[0][:, 0]
    total: torch.Tensor = sum(part.sum(-1) for part in parts)  # type: ignore[assignment]
    return total


def in_order(parts: Sequence[torch.Tensor], blocks: Sequence[Block]) -> torch.Tensor:
    """Rows [R, d] from the columns of all blocks."""
    if len(blocks) == 1:
        return parts[0]
    if parts[0].is_meta:
        return ghost((len(parts[0]), blocks[0].size))
    rows = torch.cat(list(parts), -1)
    return rows[:, to_device(_order(tuple(blocks)), rows.device, "public")]


@cache
def _order(blocks: tuple[Block, ...]) -> torch.Tensor:
    """Where each column of a row is among those of the blocks, which `_blocks` made once."""
    return torch.cat([block.columns for block in blocks]).argsort()


def blocks_of(spec: RowNorm, parts: Sequence[int]) -> tuple[Block, ...]:
    """The columns by exponent, scaled such that the squares of all of them have one scale.

    parts: see `normalize`.
    """
    return _blocks(spec, tuple(parts))


@cache
def _blocks(spec: RowNorm, parts: tuple[int, ...]) -> tuple[Block, ...]:
    blocks = []
    for exponent, columns in groups(parts, spec.size):
        lift = max(0, exponent - spec.square_shift)
        finer = lift - exponent
        frac = math.floor(spec.frac) + finer
        blocks.append(Block(columns, spec.size, lift, frac, spec.square_shift + finer))
    return tuple(blocks)


def _open_block(ctx: Context, rows: torch.Tensor, spec: RowNorm, block: Block) -> Protocol:
    """The shares of the squares [R, columns], and the opened `Row`."""
    rows = block.of(rows)
    if ctx.exact:
        squares, row = yield from together(
            truncated_square(ctx, rows, block.square_shift),
            open_row(ctx, rows, block.frac, spec.inverse_root, spec.largest),
        )
        return squares, row
    mask = ctx.mask(rows.shape)
    dealt = deal_square(ctx, mask, block.square_shift)
    opened = yield from open_under(ctx, rows, mask, OFFSET)
    squares = opened
    if not rows.is_meta:
        squares = square_share(ctx, opened, dealt, block.square_shift)
    return squares, Row(opened, mask, dealt[0])


def rounded_rows(rows: torch.Tensor, spec: RowNorm) -> torch.Tensor:
    """What `normalize` returns for rows in the clear, with its roundings: [..., d], float64.

    The squares have `spec.frac - spec.square_shift` fractional bits, eps is a whole number of their
    units, and the result has 16 bits behind the point.
    """
    unit = 2.0 ** (spec.square_shift - spec.frac)
    rows = rows.double()
    total = (rows / unit).round().square().sum(-1, keepdim=True) + spec.eps_units
    result = rows / unit * (total.clamp(min=1.0) / spec.size).rsqrt()
    return (result * 2.0**FRACTIONAL_BITS).round() * 2.0**-FRACTIONAL_BITS


def normalize_cost(spec: RowNorm, rows: int, parts: Sequence[int] = ()) -> Cost:
    """Cost of `normalize` for `rows` rows."""
    opened = scaled = Cost()
    for block in blocks_of(spec, parts):
        size = len(block.columns)
        opened = opened.beside(truncated_square_cost(rows * size))
        scaled = scaled.beside(scale_rows_cost(block.frac, spec.inverse_root, rows, size))
    return opened + row_factor_cost(spec.inverse_root, rows) + scaled
