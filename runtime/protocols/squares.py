"""The square of a truncated value, from the one opening that truncates it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.protocols.opening import open_under
from runtime.protocols.truncate import OFFSET, Truncation, top_bit
from runtime.spec import Cost
from runtime.values import logical_shift


@dataclass
class DealtSquare:
    """Shares of what (x >> shift)**2 takes beside the opened z = x + 2**62 + r.

    top: msb(r). low: r >> shift. low_square, low_top: its square and its product with top.
    """

    shift: int
    top: torch.Tensor
    low: torch.Tensor
    low_square: torch.Tensor
    low_top: torch.Tensor

    @classmethod
    def deal(cls, ctx: Context, mask: torch.Tensor, shift: int) -> DealtSquare:
        """For values that are opened under `mask`; offline 32 bytes per element."""
        shape = mask.shape
        return cls(
            shift,
            ctx.deal(shape, lambda: top_bit(mask)),
            ctx.deal(shape, lambda: logical_shift(mask, shift)),
            ctx.deal(shape, lambda: logical_shift(mask, shift) ** 2),
            ctx.deal(shape, lambda: logical_shift(mask, shift) * top_bit(mask)),
        )

    def share(self, ctx: Context, opened: torch.Tensor) -> torch.Tensor:
        """Share of the square, once z is open: (base - low + wrap top)**2 multiplied out."""
        x = Truncation(opened, self.shift)
        return (
            ctx.public(x.base * x.base)
            + self.low_square
            + (x.wrap * x.wrap + 2 * x.base * x.wrap) * self.top
            - 2 * x.base * self.low
            - 2 * x.wrap * self.low_top
        )


def truncated_square(ctx: Context, share: torch.Tensor, shift: int) -> Protocol:
    """Shares of (x / 2**shift)**2, x / 2**shift rounded as in `truncate`.

    In: additive share with |x| < 2**62 whose rounded square is below 2**63. Rounds 1, online 16
    bytes per element, offline 32. Each party sees z = x + 2**62 + r, uniform as r is fresh.
    """
    mask = ctx.mask(share.shape)
    dealt = DealtSquare.deal(ctx, mask, shift)
    opened = yield from open_under(ctx, share, mask, OFFSET)
    return opened if opened.is_meta else dealt.share(ctx, opened)


def truncated_square_cost(count: int) -> Cost:
    """Cost of `truncated_square` for `count` elements."""
    return Cost(rounds=1, online=16 * count, offline=32 * count)
