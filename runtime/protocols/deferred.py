"""A normalized row times a constant, where the row is scaled behind the product.

A row's scale commutes with a product: (s x) W = s (x W). So x W and the number that s depends on
can be worked on at the same time. The row is opened once, and its sum of squares V and the row
itself, truncated, follow from the opening. While V is opened, the truncated row goes to the server
(`weights.move`), which costs no round of its own. While the mantissas of the power of V are opened,
so is u = x W, and s u is a public combination of dealt words. For each output that takes more bytes
than sending a normalized row takes for each input, but one round less, or two if the normalized row
would have to be truncated.

Opening, truncation, power and scaling are those of `normalize`; scaling the product instead of the
row is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.core.values import Shared, Wide, logical_shift
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.normalize import (
    SCALED_FRAC,
    Block,
    Row,
    RowNorm,
    blocks_of,
    fits_wide_rows,
    in_order,
    open_row,
    open_row_cost,
    row_factor,
    row_factor_cost,
    row_factor_wide,
    row_factor_wide_cost,
    scale_rows,
    scale_rows_cost,
    scale_rows_wide,
    scale_rows_wide_cost,
    total_of,
)
from mergec.runtime.protocols.opening import open_masked_cost, open_under
from mergec.runtime.protocols.squares import (
    deal_square,
    square_share,
    truncated_square,
    truncated_square_cost,
)
from mergec.runtime.protocols.truncate import OFFSET, Truncation, truncate
from mergec.runtime.protocols.weights import Constant, linear, move, move_cost
from mergec.runtime.protocols.wide import each_half, shifted_wide

LARGEST = 14
"""Scaled products must be below 2**LARGEST."""


@dataclass(frozen=True)
class Deferred:
    """The scales of a product of normalized rows, all derived from public numbers.

    norm: of the rows. drop: bits that are dropped off a row before the product. weight_frac:
    fractional bits of the constant. finer: fractional bits of the result beyond `SCALED_FRAC`.
    parts: columns of the product whose constant and result have further fractional bits, as in
    `mpc.linear`.
    """

    norm: RowNorm
    drop: int
    weight_frac: int
    finer: int
    parts: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.finer < 0:
            raise ValueError(f"a scaled product has no {SCALED_FRAC + self.finer} fractional bits")

    @property
    def frac(self) -> int:
        """Fractional bits of the product before it is scaled, without its further ones."""
        return math.floor(self.norm.frac) - self.drop + self.weight_frac

    def dropped(self, block: Block) -> int:
        """Bits that are dropped off the words of a block; below 0, by how much they are lifted."""
        return block.frac - math.floor(self.norm.frac) + self.drop

    def further(self, columns: int) -> list[tuple[int, int]]:
        """Runs of columns, each with its further fractional bits.

        Raises ValueError if `parts` has others.
        """
        runs = list(zip(self.parts[::2], self.parts[1::2], strict=True)) or [(columns, 0)]
        if sum(run for run, _ in runs) != columns or min(bits for _, bits in runs) < 0:
            raise ValueError(f"the parts {self.parts} are not those of {columns} columns")
        return runs


def deferred_norm(
    ctx: Context,
    share: torch.Tensor,
    weight: Constant,
    spec: Deferred,
    columns: Sequence[int] = (),
) -> Protocol:
    """Shares of (x / sqrt(mean(x**2) + eps)) @ weight.T, with 32 fractional bits and `spec.finer`.

    In: additive share [..., d] of rows with |x| < 2**62 and mean square at most `spec.norm.bound`,
    and a constant [O, d], held by the server or shared. The product must be below 2**62 in its
    units before it is scaled, and below 2**14 and 2**62 units afterwards. Out: [..., O]. Error:
    that of the product with the row and the constant as they are rounded; of that, 2**-14 relative
    by the mantissa (with exact rounding 2**-13); and two units of 2**-16.

    Rounds 3: the row; V and the row for the product; the mantissas and the product. Online 16 bytes
    per element of the row, 8 more (16 if the constant is shared) for the product, 16 per element of
    the result, and those of `row_factor`. Offline 32 bytes per element of the row, 8 more if bits
    are dropped, per element of the result 16 and those of `scale_rows`, and those of `row_factor`.

    Both parties see z = x + 2**62 + r and z' = x W + 2**62 + r': uniform, because r and r' are
    fresh and uniform on the ring, and each is used for this opening alone. The server sees in
    addition the truncated row minus a mask that is fresh and the client's own (`weights.send`). All
    else is what they see in `row_factor`. With exact rounding the row is opened twice, and once
    more to be truncated, and every opening that is rounded is one of `open_high`: rounds 8.

    columns: of the row, those that stand for numbers larger by powers of two (`normalize`).
    """
    rows = share.reshape(-1, share.shape[-1])
    total, kept = yield from _opened_row(ctx, rows, spec, columns)
    power = spec.norm.inverse_root
    factor, row = yield from together(
        row_factor(ctx, total, power), _opened_product(ctx, kept, weight, spec)
    )
    runs = spec.further(row.opened.shape[-1])
    if ctx.exact:
        frac = spec.frac + max(further for _, further in runs)
        result = yield from scale_rows(ctx, row, frac, factor, power)
        result = _shifted(result, [(size, spec.finer + further) for size, further in runs])
    else:
        scaled, first = [], 0
        for size, further in runs:
            own = slice(first, first + size)
            part = Row(row.opened[:, own], row.mask[:, own], row.top[:, own])
            frac = spec.frac + further
            scaled.append((yield from scale_rows(ctx, part, frac, factor, power, spec.finer)))
            first += size
        result = _shifted(torch.cat(scaled, -1), runs)
    return result.reshape(*share.shape[:-1], result.shape[-1])


def deferred_norm_wide(
    ctx: Context,
    share: torch.Tensor,
    weight: Constant,
    spec: Deferred,
    columns: Sequence[int] = (),
) -> Protocol:
    """The result of `deferred_norm` in shares modulo 2**128, a `Wide` [..., O].

    So it need not fit into the ring of 64 bits, and no opening truncates it. Not for exact
    rounding. Rounds and what is opened are those of `deferred_norm`, but for the mantissas
    (`row_factor_wide`); offline bytes of an element of the result are those of `scale_rows_wide`,
    in place of 8 and those of `scale_rows`.
    """
    rows = share.reshape(-1, share.shape[-1])
    total, kept = yield from _opened_row(ctx, rows, spec, columns)
    power = spec.norm.inverse_root
    factor, (opened, mask) = yield from together(
        row_factor_wide(ctx, total, power), _opened_alone(ctx, kept, weight)
    )
    runs = spec.further(opened.shape[-1])
    found, first = [], 0
    for size, further in runs:
        own, frac = slice(first, first + size), spec.frac + further
        part = opened[:, own], mask[:, own]
        found.append(scale_rows_wide(ctx, *part, frac, factor, power, spec.finer))
        first += size
    low, high = (torch.cat([getattr(x, half) for x in found], -1) for half in ("low", "high"))
    result = Wide(low, high, SCALED_FRAC + spec.finer)
    if any(further for _, further in runs):
        sizes, bits = map(torch.tensor, zip(*runs, strict=True))
        result = shifted_wide(result, bits.repeat_interleave(sizes))
    shape = (*share.shape[:-1], result.shape[-1])
    return each_half(result, lambda half: half.reshape(shape))


def fits_wide_product(spec: Deferred, outputs: int) -> bool:
    """Whether `deferred_norm_wide` can scale this product."""
    power = spec.norm.inverse_root
    runs = spec.further(outputs)
    return all(fits_wide_rows(spec.frac + further, power, spec.finer) for _, further in runs)


def deferred_norm_cost(
    spec: Deferred,
    rows: int,
    weight: Constant,
    columns: Sequence[int] = (),
    wide: bool = False,
) -> Cost:
    """Cost of `deferred_norm`, or of `deferred_norm_wide`, for `rows` rows."""
    outputs, size = weight.shape
    power = spec.norm.inverse_root
    product = move_cost(rows * size, weight) + Cost(offline=8 * rows * outputs)
    row = Cost()
    for block in blocks_of(spec.norm, columns):
        count = rows * len(block.columns)
        low = Cost(offline=8 * count if spec.dropped(block) > 0 else 0)
        row = row.beside(truncated_square_cost(count) + low)
    count = rows * outputs
    opened = product + (open_masked_cost(count) if wide else open_row_cost(count))
    scaled, cost_of = Cost(), scale_rows_wide_cost if wide else scale_rows_cost
    for count, further in spec.further(outputs):
        scaled += cost_of(spec.frac + further, power, rows, count, spec.finer)
    factor_cost = row_factor_wide_cost if wide else row_factor_cost
    return row + factor_cost(power, rows).beside(opened) + scaled


def _opened_row(
    ctx: Context, rows: torch.Tensor, spec: Deferred, columns: Sequence[int]
) -> Protocol:
    """Shares of each row's sum of squares plus eps, and of the row without its lowest bits."""
    blocks = blocks_of(spec.norm, columns)
    opened = yield from together(*(_open_block(ctx, rows, spec, block) for block in blocks))
    total = total_of([squares for squares, _ in opened])
    if ctx.party == CLIENT:
        total += spec.norm.eps_units
    return total, in_order([kept for _, kept in opened], blocks)


def _open_block(ctx: Context, rows: torch.Tensor, spec: Deferred, block: Block) -> Protocol:
    """The same of columns of one exponent: shares of squares and of what is kept."""
    rows, shift, drop = block.of(rows), block.square_shift, spec.dropped(block)
    if ctx.exact:
        squares, kept = yield from together(
            truncated_square(ctx, rows, shift), truncate(ctx, rows, max(0, drop))
        )
    else:
        mask = ctx.mask(rows.shape)
        dealt = deal_square(ctx, mask, shift)
        low = ctx.deal(rows.shape, lambda: _low(mask, drop)) if drop > 0 else rows
        opened = yield from open_under(ctx, rows, mask, OFFSET)
        squares, kept = opened, rows
        if not rows.is_meta:
            squares = square_share(ctx, opened, dealt, shift)
            if drop > 0:
                cut = Truncation(opened, drop)
                kept = ctx.public(cut.base) - low + cut.wrap * dealt[0]
    return squares, kept << -drop if drop < 0 and not kept.is_meta else kept


def _low(mask: torch.Tensor, shift: int) -> torch.Tensor:
    """r >> shift of unsigned words. Called by the dealer."""
    return logical_shift(mask, shift)


def _opened_product(ctx: Context, kept: torch.Tensor, weight: Constant, spec: Deferred) -> Protocol:
    """The rows times the constant, opened for `scale_rows`. Rounds 2.

    With exact rounding all columns get one scale.
    """
    moved = yield from move(ctx, Shared(kept, 0), weight)
    product = linear(ctx, moved, weight)
    frac = spec.frac
    if ctx.exact:
        runs = spec.further(product.shape[-1])
        most = max(further for _, further in runs)
        product = _shifted(product, [(size, most - further) for size, further in runs])
        frac += most
    row: Row = yield from open_row(ctx, product, frac, spec.norm.inverse_root, LARGEST)
    return row


def _opened_alone(ctx: Context, kept: torch.Tensor, weight: Constant) -> Protocol:
    """The rows times the constant, opened for `scale_rows_wide`, and its mask. Rounds 2."""
    moved = yield from move(ctx, Shared(kept, 0), weight)
    product = linear(ctx, moved, weight)
    mask = ctx.mask(product.shape)
    opened = yield from open_under(ctx, product, mask, OFFSET)
    return opened, mask


def _shifted(words: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Words [R, O] shifted up, runs of columns each by a number of bits."""
    if words.is_meta:
        return words
    sizes, bits = map(torch.tensor, zip(*runs, strict=True))
    return words << to_device(bits.repeat_interleave(sizes), words.device, "public")
