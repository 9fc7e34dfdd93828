"""Faithful truncation: divide a share by a power of two, at most one unit off, never a wrap."""

from __future__ import annotations

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import CLIENT, HEADROOM_BITS, RING_BITS, Cost
from mergec.runtime.core.values import logical_shift
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.compare import WINDOW_BITS, take_window
from mergec.runtime.protocols.opening import open_under

OFFSET = 1 << HEADROOM_BITS
NARROW_OFFSET = 1 << (WINDOW_BITS - 2)
"""What makes a value of less than 30 bits positive in a window of 32."""

PARTS = 3
"""Dealt words of a truncated value: see `Truncation`."""


class Truncation:
    """A truncated value as a public combination of dealt words, when z = x + 2**(n-2) + r is open.

    In a ring of n = 64 or 32 bits, for |x| < 2**(n - 2),

        floor(x / 2**shift) or one more = base - low + wrap * top

    where `base` and `wrap` are public, `low` = r >> shift and `top` = msb(r) are shared: as
    x + 2**(n - 2) < 2**(n - 1), the sum wrapped exactly if r has its top bit set and z has not. The
    result is right modulo 2**64 in either case. Kept apart so that products with the truncated
    value can be formed from the same opening. With shift 0 it is x itself, lifted to 64 bits.
    """

    def __init__(self, opened: torch.Tensor, shift: int) -> None:
        width = WINDOW_BITS if opened.dtype is torch.int32 else RING_BITS
        self.base = _unsigned_shift(opened, shift) - (1 << (width - 2 - shift))
        no_top = (opened >= 0).to(torch.int64)
        self.wrap = no_top << (width - shift) if width - shift < RING_BITS else no_top * 0

    @property
    def weights(self) -> torch.Tensor:
        """[..., 3]: what `truncation_parts` are multiplied by to give the value."""
        return torch.stack([self.base, torch.full_like(self.base, -1), self.wrap], -1)


def truncation_parts(mask: torch.Tensor, shift: int) -> torch.Tensor:
    """1, r >> shift and the top bit of r, [..., 3]: for the dealer."""
    out = torch.ones((*mask.shape, PARTS), dtype=torch.int64)
    flat = out.numpy().reshape(-1, PARTS)
    _deal_cpu(mask.cpu().numpy().reshape(-1), shift, width_of(mask), flat[:, 1], flat[:, 2])
    return out.to(mask.device)


def truncation_words(mask: torch.Tensor, shift: int) -> torch.Tensor:
    """r >> shift and the top bit of r, [2, ...], on the CPU: for the dealer."""
    out = torch.empty((2, *mask.shape), dtype=torch.int64)
    flat = out.numpy().reshape(2, -1)
    _deal_cpu(mask.cpu().numpy().reshape(-1), shift, width_of(mask), flat[0], flat[1])
    return out


def width_of(words: torch.Tensor) -> int:
    """The bits of a word: those of the ring that it is in."""
    return 8 * words.element_size()


def top_bit(mask: torch.Tensor) -> torch.Tensor:
    """The most significant bit of words of 64 or 32 bits, as int64."""
    return (mask < 0).to(torch.int64)


def _unsigned_shift(words: torch.Tensor, shift: int) -> torch.Tensor:
    if words.dtype is torch.int32:
        return (words.long() & 0xFFFFFFFF) >> shift
    return logical_shift(words, shift)


def truncate(ctx: Context, share: torch.Tensor, shift: int) -> Protocol:
    """Shares of x / 2**shift, rounded down or up at random with expectation x / 2**shift.

    In: additive share of x modulo 2**64 with |x| < 2**62; 0 <= shift <= 62. A negative shift
    multiplies by a power of two, locally. Out: additive share, error at most one unit; from shift
    33 on, 1.5 units at most. Rounds 1, online 16 bytes per element, offline 16. From shift 32 on
    the parties drop 32 bits of their shares first, which is exact modulo 2**32 but for the carry (a
    unit, half of it on average, is added), and open the 32-bit window of 30 bits: 8 bytes online.
    Each party sees z = x + 2**62 + r, uniform as r is fresh and uniform modulo 2**64 (2**32). The
    dealer sees the shape. Source: the exact form of probabilistic truncation with a msb correction,
    as in Escudero et al., "Improved Primitives for MPC over Mixed Arithmetic-Binary Circuits"
    (CRYPTO 2020), section 5, and Dalskov et al., "Secure Evaluation of Quantized Neural Networks"
    (PETS 2020), section 4.
    """
    if shift <= 0:
        return share if share.is_meta else share << -shift
    offset = OFFSET
    if shift >= WINDOW_BITS:
        share, shift, offset = unbiased_window(ctx, share, WINDOW_BITS), shift - 32, NARROW_OFFSET
    mask = ctx.mask(share.shape, share.dtype)
    words = ctx.deal((2, *share.shape), lambda: truncation_words(mask, shift))
    opened = yield from open_under(ctx, share, mask, offset)
    if opened.is_meta:
        return words[0]
    if opened.is_cuda:
        parts = Truncation(opened, shift)
        return ctx.public(parts.base) - words[0] + parts.wrap * words[1]
    out = torch.empty(opened.shape, dtype=torch.int64)
    _truncate_cpu(
        opened.numpy().reshape(-1), words.numpy().reshape(2, -1), shift, width_of(opened),
        ctx.party == CLIENT, out.numpy().reshape(-1),
    )  # fmt: skip
    return out


def truncate_cost(count: int, shift: int) -> Cost:
    """Cost of `truncate` for `count` elements."""
    if shift <= 0:
        return Cost()
    return Cost(rounds=1, online=(8 if shift >= WINDOW_BITS else 16) * count, offline=16 * count)


def unbiased_window(ctx: Context, share: torch.Tensor, drop: int) -> torch.Tensor:
    """`take_window` with the expected loss added: the error is in (-1, 1], and zero on average."""
    window = take_window(share, drop)
    return window if drop == 0 or window.is_meta or ctx.party != CLIENT else window + 1


@compiled(inline="always")
def low_of(word, shift, width):  # type: ignore[no-untyped-def]
    """A word of so many bits shifted down, its sign not copied: of a mask, a dealt word."""
    unsigned = np.uint64(word) & (np.uint64(2**64 - 1) >> np.uint64(64 - width))
    return np.int64(unsigned >> np.uint64(shift))


@compiled(inline="always")
def base_of(z, shift, width):  # type: ignore[no-untyped-def]
    """`Truncation.base` of an opened word."""
    return low_of(z, shift, width) - (np.int64(1) << (width - 2 - shift))


@compiled(inline="always")
def wrap_of(z, shift, width):  # type: ignore[no-untyped-def]
    """`Truncation.wrap` of an opened word; shifted in two steps, as 2**64 is no word."""
    return np.int64(z >= 0) << (width - shift - 1) << 1


@compiled()
def _deal_cpu(mask, shift, width, low, top):  # type: ignore[no-untyped-def]
    for i in range(mask.shape[0]):
        low[i] = low_of(mask[i], shift, width)
        top[i] = np.int64(mask[i] < 0)


@compiled()
def _truncate_cpu(opened, words, shift, width, at_client, out):  # type: ignore[no-untyped-def]
    low, top = words[0], words[1]
    for i in range(opened.shape[0]):
        base = base_of(opened[i], shift, width) if at_client else np.int64(0)
        out[i] = base - low[i] + wrap_of(opened[i], shift, width) * top[i]
