"""Openings: to both parties, or under a mask."""

from __future__ import annotations

import torch

from runtime.context import Context
from runtime.messages import Protocol, Swap
from runtime.spec import Cost
from runtime.values import Masked, Shared


def reconstruct(share: torch.Tensor) -> Protocol:
    """Add the two parties' shares of a value that is safe to open; only for masked values."""
    other = yield Swap(share)
    return share + other


def open_masked(ctx: Context, x: Shared) -> Protocol:
    """Open x under a fresh mask r: both learn z = x + r mod 2**64.

    In: Shared of any shape. Out: Masked of the same shape and fractional bits.
    Rounds 1, online 16 bytes per element, offline none (r is expanded from seeds).
    Each party sees the other's share of z. z is uniform as r is, and used for this wire alone.
    """
    mask = ctx.mask(x.shape)
    opened = yield from reconstruct(x.share + mask)
    return Masked(opened, mask, x.frac)


def open_masked_cost(count: int) -> Cost:
    """Cost of `open_masked` for `count` elements."""
    return Cost(rounds=1, online=16 * count)
