"""Faithful truncation: divide a share by a power of two, at most one unit off, never a wrap."""

from __future__ import annotations

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.protocols.opening import open_under
from runtime.spec import HEADROOM_BITS, Cost
from runtime.values import logical_shift

OFFSET = 1 << HEADROOM_BITS


class Truncation:
    """The public and the dealt part of a truncated value, once z = x + 2**62 + r is open.

    floor(x / 2**shift) or one more = base - low + wrap * top, where `base` and `wrap` are public,
    `low` = r >> shift and `top` = msb(r) are shared. Kept apart so that products with the truncated
    value can be formed from the same opening (see the norms).
    """

    def __init__(self, opened: torch.Tensor, shift: int) -> None:
        self.base = logical_shift(opened, shift) - (1 << (HEADROOM_BITS - shift))
        # The sum wrapped exactly if r has its top bit set and z has not, as x + 2**62 < 2**63.
        no_top = (opened >= 0).to(torch.int64)
        self.wrap = no_top << (64 - shift) if shift else torch.zeros_like(no_top)


def top_bit(mask: torch.Tensor) -> torch.Tensor:
    """The most significant bit of 64-bit words."""
    return logical_shift(mask, 63)


def truncate(ctx: Context, share: torch.Tensor, shift: int) -> Protocol:
    """Shares of x / 2**shift, rounded down or up at random with expectation x / 2**shift.

    In: additive share of x modulo 2**64 with |x| < 2**62; 0 <= shift <= 62. A negative shift
    multiplies by a power of two, locally. Out: additive share, error below one unit.
    Rounds 1, online 16 bytes per element, offline 16 bytes per element.
    Each party sees z = x + 2**62 + r, uniform as r is fresh and uniform modulo 2**64. The dealer
    sees the shape. Source: the exact form of probabilistic truncation with a msb correction, as in
    Escudero et al., "Improved Primitives for MPC over Mixed Arithmetic-Binary Circuits"
    (CRYPTO 2020), section 5, and Dalskov et al., "Secure Evaluation of Quantized Neural Networks"
    (PETS 2020), section 4.
    """
    if shift <= 0:
        return share if share.is_meta else share << -shift
    mask = ctx.mask(share.shape)
    low = ctx.deal(share.shape, lambda: logical_shift(mask, shift))
    top = ctx.deal(share.shape, lambda: top_bit(mask))
    opened = yield from open_under(ctx, share, mask, OFFSET)
    if opened.is_meta:
        return opened
    parts = Truncation(opened, shift)
    return ctx.public(parts.base) - low + parts.wrap * top


def truncate_cost(count: int, shift: int) -> Cost:
    """Cost of `truncate` for `count` elements."""
    if shift <= 0:
        return Cost()
    return Cost(rounds=1, online=16 * count, offline=16 * count)
