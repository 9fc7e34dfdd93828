"""Faithful truncation: divide a share by a power of two, at most one unit off, without a wrap."""

from __future__ import annotations

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import CLIENT, HEADROOM_BITS, RING_BITS, Cost
from mergec.runtime.core.values import logical_shift
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.compare import WINDOW_BITS, check_drop, take_window
from mergec.runtime.protocols.opening import Cut, open_high, open_under

OFFSET = 1 << HEADROOM_BITS
NARROW_OFFSET = 1 << (WINDOW_BITS - 2)
"""Added to a value of less than 30 bits to make it positive within a 32-bit window."""

PARTS = 3
"""Dealt words per truncated value; see `Truncation`."""


class Truncation:
    """A truncated value as a public linear combination of dealt words, once z is open.

    In a ring of n = 64 or 32 bits, for |x| < 2**(n - 2) and z = x + 2**(n - 2) + r,

        floor(x / 2**shift) or one more = base - low + wrap * top

    where `base` and `wrap` are public, and `low` = r >> shift and `top` = msb(r) are shared.
    Because 0 <= x + 2**(n - 2) < 2**(n - 1), the sum wrapped around if and only if r has its top
    bit set and z has not. The result is correct modulo 2**64 in both rings. The terms are kept
    apart so that products with the truncated value can be formed from the same opening. With shift
    0 the value is x itself, lifted to 64 bits.
    """

    def __init__(self, opened: torch.Tensor, shift: int) -> None:
        width = WINDOW_BITS if opened.dtype is torch.int32 else RING_BITS
        self.base = _unsigned_shift(opened, shift) - (1 << (width - 2 - shift))
        no_top = (opened >= 0).to(torch.int64)
        self.wrap = no_top << (width - shift) if width - shift < RING_BITS else no_top * 0

    @property
    def weights(self) -> torch.Tensor:
        """[..., 3]: public factors of the `truncation_parts`; the weighted sum is the value."""
        return torch.stack([self.base, torch.full_like(self.base, -1), self.wrap], -1)


def truncation_parts(mask: torch.Tensor, shift: int) -> torch.Tensor:
    """1, r >> shift and the top bit of r, [..., 3]. Called by the dealer."""
    low, top = truncation_words(mask, shift)
    return torch.stack([torch.ones_like(low), low, top], -1)


def truncation_words(mask: torch.Tensor, shift: int) -> torch.Tensor:
    """r >> shift and the top bit of r, [2, ...]. Called by the dealer."""
    words: torch.Tensor = _WORDS(mask, shift)
    return words


def _words_host(mask: torch.Tensor, shift: int) -> torch.Tensor:
    out = torch.empty((2, *mask.shape), dtype=torch.int64)
    flat = out.numpy().reshape(2, -1)
    _deal_cpu(mask.numpy().reshape(-1), shift, width_of(mask), flat[0], flat[1])
    return out


def _words_tensors(mask: torch.Tensor, shift: int) -> torch.Tensor:
    return torch.stack([_unsigned_shift(mask, shift), top_bit(mask)])


def width_of(words: torch.Tensor) -> int:
    """Bits per word, which identifies the ring: 64 or 32."""
    return 8 * words.element_size()


def top_bit(mask: torch.Tensor) -> torch.Tensor:
    """The most significant bit of 64-bit or 32-bit words, as int64."""
    return (mask < 0).to(torch.int64)


def _unsigned_shift(words: torch.Tensor, shift: int) -> torch.Tensor:
    if words.dtype is torch.int32:
        return (words.long() & 0xFFFFFFFF) >> shift
    return logical_shift(words, shift)


def truncate(ctx: Context, share: torch.Tensor, shift: int) -> Protocol:
    """Shares of x / 2**shift, rounded down or up at random with expectation x / 2**shift.

    In: additive share of x modulo 2**64 with |x| < 2**62; shift <= 62. A negative shift multiplies
    by a power of two locally. Out: additive share with an error of at most one unit, or at most 1.5
    units from shift 33 on. Rounds 1, online 16 bytes per element, offline 16. A shift of zero or
    less costs nothing. From shift 32 on, online is 8 bytes per element: the parties first drop 32
    bits of their shares and open the 32-bit window that is left, whose value has at most 30 bits.
    Dropping is exact modulo 2**32 but for the carry and the fraction below; the expected loss, one
    unit of 2**32 (half of it for the carry), is added back (`unbiased_window`). Each party sees z =
    x + 2**62 + r (2**30 in the window), which is uniform because r is fresh and uniform modulo
    2**64 (2**32). The dealer sees the shape. Source: the exact form of probabilistic truncation
    with an msb correction, as in Escudero et al., "Improved Primitives for MPC over Mixed
    Arithmetic-Binary Circuits" (CRYPTO 2020), section 5, and Dalskov et al., "Secure Evaluation of
    Quantized Neural Networks" (PETS 2020), section 4.
    """
    if shift <= 0:
        return share if share.is_meta else share << -shift
    offset = OFFSET
    if shift >= WINDOW_BITS and not ctx.exact:
        share, shift, offset = unbiased_window(ctx, share, WINDOW_BITS), shift - 32, NARROW_OFFSET
    mask = ctx.mask(share.shape, share.dtype)
    words = ctx.deal((2, *share.shape), lambda: truncation_words(mask, shift))
    if share.dtype is torch.int32:
        opened = yield from open_under(ctx, share, mask, offset)
    else:
        opened = yield from open_high(ctx, share, mask, shift, offset)
    if opened.is_meta:
        return words[0]
    result: torch.Tensor = _TRUNCATED(opened, words, shift, ctx.party == CLIENT)
    return result


def _truncated_host(
    opened: torch.Tensor, words: torch.Tensor, shift: int, at_client: bool
) -> torch.Tensor:
    out = torch.empty(opened.shape, dtype=torch.int64)
    _truncate_cpu(
        opened.numpy().reshape(-1), words.numpy().reshape(2, -1), shift, width_of(opened),
        at_client, out.numpy().reshape(-1),
    )  # fmt: skip
    return out


def _truncated_tensors(
    opened: torch.Tensor, words: torch.Tensor, shift: int, at_client: bool
) -> torch.Tensor:
    parts = Truncation(opened, shift)
    masked = parts.wrap * words[1] - words[0]
    return parts.base + masked if at_client else masked


_WORDS = Kernel("truncation.words", _words_host, _words_tensors, triton=False)
_TRUNCATED = Kernel("elements.truncated", _truncated_host, _truncated_tensors)


def truncate_cost(count: int, shift: int) -> Cost:
    """Cost of `truncate` for `count` elements."""
    if shift <= 0:
        return Cost()
    return Cost(rounds=1, online=(8 if shift >= WINDOW_BITS else 16) * count, offline=16 * count)


def unbiased_window(ctx: Context, share: torch.Tensor, drop: int) -> torch.Tensor:
    """`take_window` with the expected loss added back: error in (-1, 1] units, zero on average."""
    window = take_window(share, drop)
    return window if drop == 0 or window.is_meta or ctx.party != CLIENT else window + 1


def window_of_zeros(ctx: Context, share: torch.Tensor) -> torch.Tensor:
    """Shares modulo 2**32 of the upper half of x, less than one unit off; exactly 0 if x is 0.

    Local: the client rounds its share down, the server up. The shares of zero are opposite, and so
    are their halves.
    """
    if share.is_meta or ctx.party == CLIENT:
        return take_window(share, WINDOW_BITS)
    return -take_window(-share, WINDOW_BITS)


def cut(ctx: Context, share: torch.Tensor, drop: int) -> Cut:
    """The 32 bits of x from `drop` on, to be opened; what they round off is zero on average.

    In: 64-bit share, any shape; drop 0 to 32. With public rounding the lower bits are dropped here
    and now, which costs nothing and whose carry depends on the client's own share. With exact
    rounding they go into the opening, and the client never sees how they round (`open_high`).
    Raises ValueError for any other drop (`take_window`).
    """
    check_drop(drop)
    if ctx.exact and drop:
        return Cut(share, drop, drop)
    return Cut(unbiased_window(ctx, share, drop))


@compiled(inline="always")
def low_of(word, shift, width):  # type: ignore[no-untyped-def]
    """Logical right shift of a `width`-bit word. Applied to the mask it yields a dealt word."""
    unsigned = np.uint64(word) & (np.uint64(2**64 - 1) >> np.uint64(64 - width))
    return np.int64(unsigned >> np.uint64(shift))


@compiled(inline="always")
def base_of(z, shift, width):  # type: ignore[no-untyped-def]
    """`Truncation.base` of an opened word."""
    return low_of(z, shift, width) - (np.int64(1) << (width - 2 - shift))


@compiled(inline="always")
def wrap_of(z, shift, width):  # type: ignore[no-untyped-def]
    """`Truncation.wrap` of an opened word; shifts in two steps because 2**64 does not fit."""
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
