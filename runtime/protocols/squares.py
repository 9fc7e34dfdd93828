"""The square of a truncated value, computed from the same opening that truncates it."""

from __future__ import annotations

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import CLIENT, RING_BITS, Cost
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.opening import open_high
from mergec.runtime.protocols.truncate import (
    OFFSET,
    Truncation,
    base_of,
    low_of,
    truncation_words,
    wrap_of,
)

_DEALT = 4
"""Words dealt per square; see `deal_square`."""


def deal_square(ctx: Context, mask: torch.Tensor, shift: int) -> torch.Tensor:
    """Share the words [4, ...] that (x >> shift)**2 needs besides the opened z = x + 2**62 + r.

    They are msb(r), r >> shift, (r >> shift)**2 and (r >> shift) msb(r). Offline 32 bytes per
    element.
    """

    return ctx.deal((_DEALT, *mask.shape), lambda: _WORDS(mask, shift))


def _words_host(mask: torch.Tensor, shift: int) -> torch.Tensor:
    out = torch.empty((_DEALT, *mask.shape), dtype=torch.int64)
    _deal_cpu(mask.numpy().reshape(-1), shift, out.numpy().reshape(_DEALT, -1))
    return out


def _words_tensors(mask: torch.Tensor, shift: int) -> torch.Tensor:
    low, top = truncation_words(mask, shift)
    return torch.stack([top, low, low * low, low * top])


_WORDS = Kernel("squares.words", _words_host, _words_tensors, triton=False)


def square_share(
    ctx: Context, opened: torch.Tensor, dealt: torch.Tensor, shift: int
) -> torch.Tensor:
    """Share of the square once z is open: (base - low + wrap top)**2, expanded.

    dealt: the words from `deal_square`. `Truncation` defines base, low, wrap and top.
    """
    square: torch.Tensor = _SQUARED(opened, dealt, shift, ctx.party == CLIENT)
    return square


def _squared_host(
    opened: torch.Tensor, dealt: torch.Tensor, shift: int, at_client: bool
) -> torch.Tensor:
    out = torch.empty(opened.shape, dtype=torch.int64)
    _square_cpu(
        opened.numpy().reshape(-1), dealt.numpy().reshape(_DEALT, -1), shift, at_client,
        out.numpy().reshape(-1),
    )  # fmt: skip
    return out


def _squared_tensors(
    opened: torch.Tensor, dealt: torch.Tensor, shift: int, at_client: bool
) -> torch.Tensor:
    parts, (top, low, low_square, low_top) = Truncation(opened, shift), dealt
    base, wrap = parts.base, parts.wrap
    mixed = wrap * (wrap + 2 * base) * top - 2 * base * low - 2 * wrap * low_top
    total = low_square + mixed
    return total + base * base if at_client else total


_SQUARED = Kernel("elements.squared", _squared_host, _squared_tensors)


def truncated_square(ctx: Context, share: torch.Tensor, shift: int) -> Protocol:
    """Shares of (x / 2**shift)**2, where x / 2**shift is rounded as in `truncate`.

    In: additive share with |x| < 2**62 whose rounded square is below 2**63. Rounds 1, online 16
    bytes per element, offline 32. Each party sees z = x + 2**62 + r, which is uniform because r is
    fresh and uniform.
    """
    mask = ctx.mask(share.shape)
    dealt = deal_square(ctx, mask, shift)
    opened = yield from open_high(ctx, share, mask, shift, OFFSET)
    return opened if opened.is_meta else square_share(ctx, opened, dealt, shift)


def truncated_square_cost(count: int) -> Cost:
    """Cost of `truncated_square` for `count` elements."""
    return Cost(rounds=1, online=16 * count, offline=8 * _DEALT * count)


@compiled()
def _deal_cpu(mask, shift, out):  # type: ignore[no-untyped-def]
    tops, lows, squares, products = out[0], out[1], out[2], out[3]
    for i in range(mask.shape[0]):
        top, low = np.int64(mask[i] < 0), low_of(mask[i], shift, RING_BITS)
        tops[i], lows[i], squares[i], products[i] = top, low, low * low, low * top


@compiled()
def _square_cpu(opened, dealt, shift, at_client, out):  # type: ignore[no-untyped-def]
    top, low, low_square, low_top = dealt[0], dealt[1], dealt[2], dealt[3]
    for i in range(opened.shape[0]):
        base, wrap = base_of(opened[i], shift, RING_BITS), wrap_of(opened[i], shift, RING_BITS)
        public = base * base if at_client else np.int64(0)
        mixed = wrap * (wrap + 2 * base) * top[i] - 2 * base * low[i] - 2 * wrap * low_top[i]
        out[i] = public + low_square[i] + mixed
