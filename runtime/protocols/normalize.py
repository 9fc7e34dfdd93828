"""Division of rows by their root mean square, on a single opening of the row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.protocols.opening import open_masked, open_masked_cost, open_under
from runtime.protocols.power import MAX_EXPONENT, Power, power, power_cost
from runtime.protocols.squares import DealtSquare
from runtime.protocols.truncate import OFFSET, Truncation, top_bit
from runtime.spec import FRACTIONAL_BITS, Cost
from runtime.values import Shared, logical_shift

DEFAULT_BOUND = 2.0**14
"""Largest mean square of a row when no calibration gave one."""


@dataclass(frozen=True)
class RowNorm:
    """The scales of a row normalization, all derived from public numbers.

    size: row length d. frac: fractional bits of the rows, any real number, so that rows scaled by a
    constant cost nothing. eps: added to the mean square. bound: largest mean square.
    """

    size: int
    frac: float
    eps: float
    bound: float

    @property
    def square_shift(self) -> int:
        """Bits dropped before squaring, so that the sum of squares stays below 2**54."""
        room = (MAX_EXPONENT - math.log2(self.size * (self.bound or DEFAULT_BOUND))) / 2
        return max(0, math.ceil(self.frac - room))

    @property
    def shift(self) -> int:
        """Bits dropped before the product with the inverse root: at least 16 stay."""
        return max(0, math.floor(self.frac - FRACTIONAL_BITS))

    @property
    def eps_units(self) -> int:
        """eps on the scale of the sum of squares."""
        return round(self.eps * self.size * 2.0 ** (2 * (self.frac - self.square_shift)))

    @property
    def inverse_root(self) -> Power:
        """From the sum of squares to the factor of the row."""
        squares = 2 * (self.frac - self.square_shift) + math.log2(self.size)
        # The row keeps a fraction of a bit more than 16 where `frac` is not an integer.
        surplus = self.frac - self.shift - FRACTIONAL_BITS
        low = max(0, math.floor(math.log2(max(1, self.eps_units))))
        return Power(-0.5, squares - 2 * surplus, min(low, MAX_EXPONENT - 1), MAX_EXPONENT)

    @property
    def out_frac(self) -> int:
        """Fractional bits of the normalized row."""
        return FRACTIONAL_BITS + self.inverse_root.out_frac


def normalize(ctx: Context, share: torch.Tensor, spec: RowNorm) -> Protocol:
    """Shares of x / sqrt(mean(x**2) + eps) for each row, with `spec.out_frac` fractional bits.

    In: additive share [..., d] of rows with |x| < 2**62 and mean square at most `bound`.
    Rounds 2 more than the inverse root's. The row is opened once, as z = x + 2**62 + r; with
    x >> s = base - low + wrap top (`truncate`) the square is a public combination of dealt
    low, low**2, top and low top, and the product with the opened inverse root one of dealt products
    with its mask. Online 16 bytes per element and per row, offline 56 per element, and the inverse
    root of each row. Each party sees z and the masked inverse root, both uniform.
    """
    mask = ctx.mask(share.shape)
    wide = spec.shift
    dealt = DealtSquare.deal(ctx, mask, spec.square_shift)
    large = ctx.deal(share.shape, lambda: logical_shift(mask, wide))
    opened = yield from open_under(ctx, share, mask, OFFSET)
    if opened.is_meta:
        total = torch.empty((*share.shape[:-1], 1), dtype=torch.int64, device="meta")
    else:
        square = dealt.share(ctx, opened)
        total = square.sum(-1, keepdim=True) + ctx.public(torch.tensor(spec.eps_units))
    root = yield from power(ctx, total, spec.inverse_root)
    factor = yield from open_masked(ctx, Shared(root, spec.inverse_root.out_frac))
    # The row is z's public part less two shared ones, each of which takes part in a product.
    low_cross = ctx.deal(share.shape, lambda: logical_shift(mask, wide) * factor.mask)
    top_cross = ctx.deal(share.shape, lambda: top_bit(mask) * factor.mask)
    if opened.is_meta:
        return opened
    x = Truncation(opened, wide)
    by_base = x.base * (ctx.public(factor.opened) - factor.mask)
    by_low = large * factor.opened - low_cross
    by_top = x.wrap * (dealt.top * factor.opened - top_cross)
    return by_base - by_low + by_top


def normalize_cost(spec: RowNorm, rows: int) -> Cost:
    """Cost of `normalize` for that many rows."""
    count = rows * spec.size
    opening = Cost(rounds=1, online=16 * count, offline=7 * 8 * count)
    return opening + power_cost(spec.inverse_root, rows) + open_masked_cost(rows)
