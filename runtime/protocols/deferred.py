"""A normalized row times a constant, where the row is scaled behind the product.

A row's scale commutes with a product: (s x) W = s (x W). So x W and the number that s depends on
can be worked on at the same time. The row is opened once, and its sum of squares V and the row
itself, truncated, follow from the opening. While V is opened, the truncated row goes to the server
(`weights.move`), which costs no round of its own. While the mantissas of the power of V are opened,
so is u = x W, and s u is a public combination of dealt words. For each output that takes more bytes
than sending a normalized row takes for each input, but one round less, or two if the normalized row
would have to be truncated.

Only a few of the octaves that V may lie in need a shift of u of their own: in a *band* of adjacent
octaves u is rounded for the smallest rows, and the surplus bits of the others stay in the result,
if it has room for them. Opening, truncation and power are those of `normalize`; scaling the product
instead of the row, and the bands, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import CLIENT, FRACTIONAL_BITS, HEADROOM_BITS, RING_BITS, Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.local import ghost
from mergec.runtime.protocols.normalize import SCALED_FRAC, RowNorm, open_row, scale_rows
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.power import octaves, octaves_cost
from mergec.runtime.protocols.squares import (
    deal_square,
    square_share,
    truncated_square,
    truncated_square_cost,
)
from mergec.runtime.protocols.truncate import (
    OFFSET,
    Truncation,
    base_of,
    low_of,
    top_bit,
    truncate,
    wrap_of,
)
from mergec.runtime.protocols.weights import Constant, linear, move, move_cost

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

    @property
    def span(self) -> int:
        """Octaves per band: each but the first takes one more bit of the result."""
        return self.finer + 1

    @property
    def shifts(self) -> np.ndarray:
        """By how much each band shifts the product down, without its further fractional bits."""
        power = self.norm.inverse_root
        first = self.frac - FRACTIONAL_BITS - power.first_exponent
        return np.arange(first, first + power.octaves.levels, self.span)

    def further(self, columns: int) -> np.ndarray:
        """Further fractional bits of each column. Raises ValueError if `parts` has others."""
        if not self.parts:
            return np.zeros(columns, np.int64)
        found = np.repeat(np.array(self.parts[1::2]), np.array(self.parts[::2]))
        if len(found) != columns or found.min() < 0:
            raise ValueError(f"the parts {self.parts} are not those of {columns} columns")
        return found


def deferred_norm(ctx: Context, share: torch.Tensor, weight: Constant, spec: Deferred) -> Protocol:
    """Shares of (x / sqrt(mean(x**2) + eps)) @ weight.T, with 32 fractional bits and `spec.finer`.

    In: additive share [..., d] of rows with |x| < 2**62 and mean square at most `spec.norm.bound`,
    and a constant [O, d], held by the server or shared. The product must be below 2**62 in its
    units before it is scaled, and below 2**14 and 2**62 units afterwards. Out: [..., O]. Error:
    that of the product with the row and the constant as they are rounded; of that, 2**-14 relative
    by the mantissa; and two units of 2**-16.

    Rounds 4: the row; V and the row for the product; the octaves' bits and mantissas; the power and
    the product. Online 16 bytes per element of the row, 8 more (16 if the constant is shared) for
    the product, 16 per element of the result, 16 per row and band, and those of `octaves`. Offline
    32 bytes per element of the row, 8 more if bits are dropped, 8 per element of the result for the
    product and 8 * (bands + 3) for its scaling, and those of `octaves`.

    Both parties see z = x + 2**62 + r, z' = x W + 2**62 + r', and the power in each band plus a
    mask f: uniform, because r, r' and f are fresh and uniform on the ring, and each is used for
    this opening alone. The server sees in addition the truncated row minus a mask that is fresh and
    the client's own (`weights.send`). All else is what they see in `octaves`. With exact rounding
    the row is opened twice, and once more to be truncated, and every opening that is rounded is one
    of `open_high`: rounds 9.
    """
    rows = share.reshape(-1, share.shape[-1])
    total, kept = yield from _opened_row(ctx, rows, spec)
    power = spec.norm.inverse_root
    if ctx.exact:
        found, row = yield from together(
            octaves(ctx, total, power), _exact_product(ctx, kept, weight, spec)
        )
        scaled = yield from scale_rows(ctx, row, spec.frac + _most(spec), found, power)
        if not scaled.is_meta:
            scaled = scaled << (spec.finer + _further(spec, scaled))
    else:
        found, product = yield from together(
            octaves(ctx, total, power), _product(ctx, kept, weight)
        )
        scaled = yield from scale_product(ctx, product, found, spec)
    return scaled.reshape(*share.shape[:-1], scaled.shape[-1])


def deferred_norm_cost(spec: Deferred, rows: int, weight: Constant) -> Cost:
    """Cost of `deferred_norm` for `rows` rows."""
    columns, size = weight.shape
    product = move_cost(rows * size, weight) + Cost(offline=8 * rows * columns)
    row = truncated_square_cost(rows * size)
    if spec.drop:
        row += Cost(offline=8 * rows * size)
    return (
        row
        + octaves_cost(spec.norm.inverse_root, rows).beside(product)
        + scale_product_cost(spec, rows, columns)
    )


def _opened_row(ctx: Context, rows: torch.Tensor, spec: Deferred) -> Protocol:
    """Shares of each row's sum of squares plus eps, and of the row without its lowest bits."""
    shift = spec.norm.square_shift
    if ctx.exact:
        squares, kept = yield from together(
            truncated_square(ctx, rows, shift), truncate(ctx, rows, spec.drop)
        )
    else:
        mask = ctx.mask(rows.shape)
        dealt = deal_square(ctx, mask, shift)
        low = ctx.deal(rows.shape, lambda: _low(mask, spec.drop)) if spec.drop else rows
        opened = yield from open_under(ctx, rows, mask, OFFSET)
        squares, kept = opened, rows
        if not rows.is_meta:
            squares = square_share(ctx, opened, dealt, shift)
            if spec.drop:
                cut = Truncation(opened, spec.drop)
                kept = ctx.public(cut.base) - low + cut.wrap * dealt[0]
    total = squares.sum(-1)
    if ctx.party == CLIENT:
        total += spec.norm.eps_units
    return total, kept


def _low(mask: torch.Tensor, shift: int) -> torch.Tensor:
    """r >> shift of unsigned words. Called by the dealer."""
    return torch.from_numpy((mask.cpu().numpy().view(np.uint64) >> np.uint64(shift)).view(np.int64))


def _product(ctx: Context, kept: torch.Tensor, weight: Constant) -> Protocol:
    """Shares of the rows times the constant, which are opened to the server for it. Rounds 1."""
    moved = yield from move(ctx, Shared(kept, 0), weight)
    return linear(ctx, moved, weight)


def _exact_product(ctx: Context, kept: torch.Tensor, weight: Constant, spec: Deferred) -> Protocol:
    """The product, opened for `scale_rows` with exact rounding. All columns get one scale."""
    product = yield from _product(ctx, kept, weight)
    if not product.is_meta:
        product = product << (_most(spec) - _further(spec, product))
    frac = spec.frac + _most(spec)
    return (yield from open_row(ctx, product, frac, spec.norm.inverse_root, LARGEST))


def _most(spec: Deferred) -> int:
    return max(spec.parts[1::2], default=0)


def _further(spec: Deferred, product: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(spec.further(product.shape[-1])).to(product.device)


def scale_product(
    ctx: Context, product: torch.Tensor, found: torch.Tensor, spec: Deferred
) -> Protocol:
    """Shares of the products [R, O] times the power of V that `octaves` found [R, levels].

    Like `scale_rows`, but with a shift for each band instead of each level, and with the opening of
    the product in the same round as that of the power. Rounds 1. Online 16 bytes per element and
    16 per row and band, offline 8 * (bands + 3) per element.
    """
    power = _banded(found, spec)
    mask, power_mask = ctx.mask(product.shape), ctx.mask(power.shape)
    shifts, further = spec.shifts, spec.further(product.shape[-1])
    rows, columns = product.shape
    words = len(shifts) + 3

    def secret() -> torch.Tensor:
        out = np.empty((words, rows, columns), np.int64)
        out[0] = top_bit(mask).cpu().numpy()
        _deal_cpu(mask.cpu().numpy(), power_mask.cpu().numpy(), shifts, further, out)
        return torch.from_numpy(out)

    dealt = ctx.deal((words, rows, columns), secret)
    opened, factor = yield from together(
        open_under(ctx, product, mask, OFFSET), open_under(ctx, power, power_mask)
    )
    if opened.is_meta:
        return ghost(product.shape)
    result = np.empty((rows, columns), np.int64)
    _scale_cpu(
        *(word.cpu().numpy() for word in (opened, factor, power_mask, dealt)),
        shifts, further, ctx.party == CLIENT, result,
    )  # fmt: skip
    return torch.from_numpy(result).to(product.device)


def scale_product_cost(spec: Deferred, rows: int, columns: int) -> Cost:
    """Cost of `scale_product`."""
    bands, count = len(spec.shifts), rows * columns
    return Cost(1, online=16 * count + 16 * rows * bands, offline=8 * (bands + 3) * count)


def _banded(found: torch.Tensor, spec: Deferred) -> torch.Tensor:
    """The power in each band [R, bands], from the mantissa in each level [R, levels]."""
    rows, levels = found.shape
    bands = len(spec.shifts)
    if found.is_meta:
        return ghost((rows, bands))
    padded = torch.nn.functional.pad(found, (0, bands * spec.span - levels))
    weights = 1 << torch.arange(spec.span - 1, -1, -1, device=found.device)
    return (padded.reshape(rows, bands, spec.span) * weights).sum(-1)


@compiled(inline="always")
def _low_of(word, shift):  # type: ignore[no-untyped-def]
    """The word shifted right as an unsigned one, or left if the shift is negative."""
    if shift > 0:
        return low_of(word, shift, RING_BITS)
    return np.int64(word) << -shift


@compiled()
def _deal_cpu(mask, factors, shifts, further, out):  # type: ignore[no-untyped-def]
    """Dealer's words from the masks r [R, O] of products and f [R, bands] of powers.

    out[1:-2]: r >> s for each band. out[-2]: the sum over the bands of (r >> s) f. out[-1]: the sum
    of msb(r) 2**(64 - s) f over the bands that shift down.
    """
    bands = shifts.shape[0]
    for i in range(mask.shape[0]):
        for e in range(mask.shape[1]):
            total, wrapped = np.int64(0), np.int64(0)
            for k in range(bands):
                s = min(shifts[k] + further[e], HEADROOM_BITS)
                low = _low_of(mask[i, e], s)
                out[1 + k, i, e] = low
                total += low * factors[i, k]
                if s > 0:
                    wrapped += factors[i, k] << (RING_BITS - s)
            out[bands + 1, i, e] = total
            out[bands + 2, i, e] = wrapped * out[0, i, e]


@compiled()
def _scale_cpu(  # type: ignore[no-untyped-def]
    opened, factor, factor_mask, dealt, shifts, further, at_client, out
):
    bands = shifts.shape[0]
    for i in range(opened.shape[0]):
        for e in range(opened.shape[1]):
            z, total, wrap = opened[i, e], dealt[bands + 1, i, e], np.int64(0)
            for k in range(bands):
                s = min(shifts[k] + further[e], HEADROOM_BITS)
                share = (factor[i, k] if at_client else np.int64(0)) - factor_mask[i, k]
                if s > 0:
                    base = base_of(z, s, RING_BITS)
                    wrap += wrap_of(z, s, RING_BITS) * factor[i, k]
                else:
                    base = (z - OFFSET) << -s
                total += base * share - dealt[1 + k, i, e] * factor[i, k]
            no_top = np.int64(z >= 0)
            total += wrap * dealt[0, i, e] - no_top * dealt[bands + 2, i, e]
            out[i, e] = total << further[e]
