"""Openings of shared values under a mask."""

from __future__ import annotations

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, Swap
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.core.values import Masked, Shared


def open_under(ctx: Context, share: torch.Tensor, mask: torch.Tensor, offset: int = 0) -> Protocol:
    """Open z = x + offset + r under the mask r: both parties learn z. r must be fresh.

    Rounds 1, online bytes twice the size of x, as both directions carry it. The dealer passes a
    meta tensor and computes nothing. Raises RuntimeError if the mask was used before.
    """
    ctx.spend(mask)
    if share.is_meta:
        yield Swap(share)
        return share
    mine = share + mask
    if offset and ctx.party == CLIENT:
        mine += offset
    other = yield Swap(mine)
    return mine + other


def open_masked(ctx: Context, x: Shared) -> Protocol:
    """Open x under a fresh mask r: both parties learn z = x + r mod 2**64.

    In: Shared of any shape. Out: Masked of the same shape and fractional bits.
    Rounds 1, online 16 bytes per element, offline none (r is expanded from seeds).
    Each party sees the other's share of z. z is uniform because r is uniform and is used for this
    value alone.
    """
    mask = ctx.mask(x.shape)
    opened = yield from open_under(ctx, x.share, mask)
    return Masked(opened, mask, x.frac)


def open_masked_cost(count: int) -> Cost:
    """Cost of `open_masked` for `count` elements."""
    return Cost(rounds=1, online=16 * count)
