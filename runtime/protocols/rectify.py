"""max(x, 0)."""

from __future__ import annotations

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.protocols.compare import (
    less_than,
    less_than_cost,
    open_window,
    open_window_cost,
    take_window,
)
from runtime.protocols.multiply import multiply, multiply_cost
from runtime.spec import Cost


def rectify(ctx: Context, share: torch.Tensor) -> Protocol:
    """Shares modulo 2**64 of max(x, 0), with the fractional bits of x.

    In: additive share of an integer in [-2**31, 2**31), any shape. Rounds 3. Each party sees
    a masked window, masked comparison bits and masked Beaver factors.
    """
    flat = share.reshape(-1)
    window = yield from open_window(ctx, take_window(flat, 0))
    negative = yield from less_than(ctx, window, [0])
    keep = negative[0]
    if not keep.is_meta:
        keep = ctx.public(torch.ones_like(keep)) - keep
    (product,) = yield from multiply(ctx, (keep, flat))
    return product.reshape(share.shape)


def rectify_cost(count: int) -> Cost:
    """Cost of `rectify` for `count` elements."""
    return open_window_cost(count) + less_than_cost(count, 1) + multiply_cost((count, count, count))
