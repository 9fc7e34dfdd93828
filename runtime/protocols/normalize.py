"""Division of rows by a power of a number of their own, with a single opening of the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import CLIENT, FRACTIONAL_BITS, HEADROOM_BITS, RING_BITS, Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.columns import groups
from mergec.runtime.protocols.opening import (
    open_high,
    open_masked,
    open_masked_cost,
    open_under,
)
from mergec.runtime.protocols.power import MAX_EXPONENT, Power, octaves, octaves_cost
from mergec.runtime.protocols.squares import (
    deal_square,
    square_share,
    truncated_square,
    truncated_square_cost,
)
from mergec.runtime.protocols.truncate import OFFSET, base_of, top_bit, truncate, wrap_of

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
    # Rows of the first level, which are scaled up most, keep 16 fractional bits, unless the result
    # would not fit into the ring.
    room = HEADROOM_BITS - 1 - largest - _whole_frac(spec)
    shift = max(0, frac - FRACTIONAL_BITS - spec.first_exponent, frac - room)
    opened = yield from open_high(ctx, share, mask, shift, OFFSET)
    return Row(opened, mask, top, shift)


def open_row_cost(count: int) -> Cost:
    """Cost of `open_row` for `count` elements in total."""
    return Cost(rounds=1, online=16 * count, offline=8 * count)


def scale_rows(ctx: Context, row: Row, frac: int, found: torch.Tensor, spec: Power) -> Protocol:
    """Shares of the rows times the power of V that `octaves` found: [R, d], 32 fractional bits.

    In: rows with `frac` fractional bits; `found` [R, levels] with 16 (`spec.mantissa_bits`). Level
    k needs the row times 2**(first_exponent - k), that is x >> s_k, a public linear combination of
    dealt words from the row's opening. Its product with the k-th mantissa is formed from the
    mantissa's own opening. All mantissas but one are zero, so the sum over k is the result. The
    full input range is supported, and only the remaining bits are rounded, at random: the error is
    two units of 2**-16 of the result, plus at most 2**-14 relative from the mantissa. Rounds 1.
    Online 16 bytes per row and level. Offline 8 bytes per element and level that shifts down, plus
    16 per element. Each party sees the mantissas under fresh, uniform masks.

    With exact rounding the bits that a level rounds off may not be those that another level needs.
    So the row is rounded once, for the first level (`open_high`), and multiplied by the power
    itself, the sum over the levels; the surplus bits are truncated. Rounds 3, and one more for the
    row.
    """
    if ctx.exact:
        found, shifts = _whole_power(found, spec), np.array([row.shift])
        down = int(row.shift > 0)
    else:
        shifts, down = _shifts(frac, spec)
    factor: Masked = yield from open_masked(ctx, Shared(found, FRACTIONAL_BITS))
    rows, size = row.opened.shape
    count = rows * size

    def parts(words: np.ndarray) -> tuple[np.ndarray, ...]:
        low = words[: down * count].reshape(rows, size, down)
        crossed, top_crossed = words[down * count :].reshape(2, rows, size)
        return low, crossed, top_crossed

    def secret() -> torch.Tensor:
        words = np.empty((down + 2) * count, np.int64)
        _deal_cpu(row.mask.cpu().numpy(), factor.mask.cpu().numpy(), shifts, *parts(words))
        return torch.from_numpy(words)

    dealt = ctx.deal(((down + 2) * count,), secret)
    if row.opened.is_meta:
        scaled = row.opened
    else:
        out = np.empty((rows, size), np.int64)
        _scale_cpu(
            *(word.cpu().numpy() for word in (row.opened, row.mask, row.top)),
            *parts(dealt.cpu().numpy()),
            *(word.cpu().numpy() for word in (factor.opened, factor.mask)),
            shifts, ctx.party == CLIENT, out,
        )  # fmt: skip
        scaled = torch.from_numpy(out).to(row.opened.device)
    if ctx.exact:
        whole = frac - row.shift + _whole_frac(spec)
        scaled = yield from truncate(ctx, scaled, whole - SCALED_FRAC)
    return scaled


def _whole_frac(spec: Power) -> int:
    """Fractional bits of a power as the sum of its levels (`_whole_power`)."""
    return FRACTIONAL_BITS - spec.first_exponent + spec.octaves.levels - 1


def _whole_power(found: torch.Tensor, spec: Power) -> torch.Tensor:
    """The power as one number [R, 1], from the shares of its mantissa in each level."""
    if found.is_meta:
        return found[:, :1]
    levels = spec.octaves.levels
    shifts = torch.arange(levels - 1, -1, -1, device=found.device)
    return (found << shifts).sum(-1, keepdim=True)


@compiled()
def _deal_cpu(mask, factors, shifts, low, crossed, top_crossed):  # type: ignore[no-untyped-def]
    """Dealer's words, from the masks r [R, d] of rows and f [R, levels] of mantissas.

    low: r >> s for the levels that shift down, [R, d, number of those]. crossed: the sum of
    (r >> s) f over all levels, [R, d]. top_crossed: the sum of msb(r) 2**(64 - s) f over the levels
    that shift down, [R, d].
    """
    for i in range(mask.shape[0]):
        for e in range(mask.shape[1]):
            r = np.uint64(mask[i, e])
            top = np.int64(r >> np.uint64(63))
            total, wrapped, down = np.int64(0), np.int64(0), 0
            for k in range(shifts.shape[0]):
                s, factor = shifts[k], factors[i, k]
                if s > 0:
                    part = np.int64(r >> np.uint64(s))
                    low[i, e, down] = part
                    down += 1
                    wrapped += factor << (64 - s)
                else:
                    part = np.int64(r << np.uint64(-s))
                total += part * factor
            crossed[i, e] = total
            top_crossed[i, e] = top * wrapped


@compiled()
def _scale_cpu(  # type: ignore[no-untyped-def]
    opened, mask, top, low, crossed, top_crossed, public, factor_mask, shifts, at_client, out
):
    levels = shifts.shape[0]
    for i in range(opened.shape[0]):
        factor = public[i]
        share = (factor if at_client else np.zeros_like(factor)) - factor_mask[i]
        wrap = np.int64(0)
        for k in range(levels):
            wrap += wrap_of(0, shifts[k], RING_BITS) * factor[k] if shifts[k] > 0 else 0
        for e in range(opened.shape[1]):
            z = opened[i, e]
            total, down = crossed[i, e], 0
            for k in range(levels):
                s = shifts[k]
                if s > 0:
                    total += base_of(z, s, RING_BITS) * share[k] - low[i, e, down] * factor[k]
                    down += 1
                else:
                    x = (z - (np.int64(1) << 62)) << -s
                    total += x * share[k] - (mask[i, e] << -s) * factor[k]
            no_top = np.int64(z >= 0)
            out[i, e] = total + no_top * (wrap * top[i, e] - top_crossed[i, e])


def scale_rows_cost(frac: int, spec: Power, rows: int, size: int) -> Cost:
    """Cost of `scale_rows` for `rows` rows of `size` elements."""
    _, down = _shifts(frac, spec)
    words = down + 2
    return open_masked_cost(rows * spec.octaves.levels) + Cost(offline=8 * words * rows * size)


@cache
def _shifts(frac: int, spec: Power) -> tuple[np.ndarray, int]:
    """Right shift of the rows in each level, and the number of levels with a positive one."""
    first = frac - FRACTIONAL_BITS - spec.first_exponent
    shifts = np.array([min(first + k, HEADROOM_BITS) for k in range(spec.octaves.levels)])
    return shifts, int((shifts > 0).sum())


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
    return Power(-0.5, squares - 2 * surplus, low, MAX_EXPONENT, FRACTIONAL_BITS)


def normalize(
    ctx: Context, share: torch.Tensor, spec: RowNorm, parts: Sequence[int] = ()
) -> Protocol:
    """Shares of x / sqrt(mean(x**2) + eps) for each row, with 32 fractional bits.

    In: additive share [..., d] of rows with |x| < 2**62 and mean square at most `bound`. Beyond the
    bound the result is wrong, but finite. Rounds 4. The row is opened once, as z = x + 2**62 + r,
    both for its squares (`deal_square`) and for `scale_rows`. Online 16 bytes per element, plus
    those of `octaves` and `scale_rows`, which are per row. Offline 32 bytes per element, plus those
    of `octaves` and `scale_rows`. Each party sees z, which is uniform because r is fresh and
    uniform, and what it sees in these two. With exact rounding the row is opened twice, as squares
    round off other bits than the scaled row: rounds 9.

    parts: columns whose words stand for numbers that are larger by powers of two, as (columns,
    exponent, columns, exponent, ...), for rows of which `spec.frac` is an integer. Columns of each
    exponent are shifted by their own number of bits, and are otherwise opened, squared and scaled
    as any others. `scale_rows` opens its mantissas once for each exponent, under a fresh mask.
    """
    rows, root = share.reshape(-1, share.shape[-1]), spec.inverse_root
    blocks = _blocks(spec, parts)
    opened = yield from together(
        *(_open_block(ctx, rows, spec, block, len(blocks) > 1) for block in blocks)
    )
    total = sum(squares.sum(-1) for squares, _ in opened)
    if ctx.party == CLIENT:
        total += spec.eps_units
    found = yield from octaves(ctx, total, root)
    scaled = yield from together(
        *(
            scale_rows(ctx, row, block.frac, found, root)
            for (_, row), block in zip(opened, blocks, strict=True)
        )
    )
    if len(blocks) == 1:
        return scaled[0].reshape(share.shape)
    if share.is_meta:
        return share
    places = torch.cat([block.columns for block in blocks]).to(share.device)
    return torch.cat(scaled, -1)[:, places.argsort()].reshape(share.shape)


@dataclass(frozen=True)
class _Block:
    """Columns of one exponent.

    lift: bits by which their words are shifted up at first. frac, square_shift: the fractional bits
    that they have then, and how many of them are dropped before squaring.
    """

    columns: torch.Tensor
    lift: int
    frac: int
    square_shift: int


def _blocks(spec: RowNorm, parts: Sequence[int]) -> list[_Block]:
    """The columns by exponent, scaled such that the squares of all of them have one scale."""
    blocks = []
    for exponent, columns in groups(parts, spec.size):
        lift = max(0, exponent - spec.square_shift)
        finer = lift - exponent
        frac = math.floor(spec.frac) + finer
        blocks.append(_Block(columns, lift, frac, spec.square_shift + finer))
    return blocks


def _open_block(
    ctx: Context, rows: torch.Tensor, spec: RowNorm, block: _Block, several: bool
) -> Protocol:
    """The shares of the squares [R, columns], and the opened `Row`."""
    if several:
        rows = rows[:, : len(block.columns)] if rows.is_meta else rows[:, block.columns]
    if block.lift and not rows.is_meta:
        rows = rows << block.lift
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
    for block in _blocks(spec, parts):
        size = len(block.columns)
        opened = opened.beside(truncated_square_cost(rows * size))
        scaled = scaled.beside(scale_rows_cost(block.frac, spec.inverse_root, rows, size))
    return opened + octaves_cost(spec.inverse_root, rows) + scaled
