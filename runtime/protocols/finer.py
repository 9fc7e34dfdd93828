"""Products with opened values, of weights with eight more bits than the result: modulo 2**72.

A share modulo 2**64 cannot drop bits without a message; one modulo 2**72 can drop eight. Weights
are opened in a larger ring anyway. But values v were opened modulo 2**64 when they entered a cache,
under masks of which the parties hold shares modulo 2**64, so more has to be dealt. With u = v +
2**62 + r opened, as in `truncate`,

    v = (u - 2**62) - r + 2**64 * msb(r) * (1 - msb(u))

holds in whole numbers, and so in any ring: its terms are public, or r and msb(r), of which shares
modulo 2**72 and 2**8 are dealt anew for each product. What counts 2**64 times is needed modulo 2**8
only, so a byte for each of these does: also the products of a weight's mask and msb(r).

A number modulo 2**72 is held as its upper 64 bits and the lower 8, with which all of this takes
products modulo 2**64 alone. Sources: Beaver (CRYPTO 1991); the wrap of a mask, see `truncate`; the
larger ring is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import CLIENT, HEADROOM_BITS, RING_BITS, Cost
from mergec.runtime.core.values import Masked, logical_shift
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.long import HALF_BITS, ONES
from mergec.runtime.kernels.matmul import matmul
from mergec.runtime.kernels.spread import whole
from mergec.runtime.protocols.opening import open_long
from mergec.runtime.protocols.truncate import top_bit

FINER_BITS = 8
"""Bits by which weights are finer."""

HALVES = 3
"""32-bit halves of the ring in which weights are opened: the fewest that hold 72 bits."""

_BYTE = (1 << FINER_BITS) - 1
_DEALT = RING_BITS // 8 + 1
"""Bytes of a number modulo 2**72."""


class _Fine(NamedTuple):
    """Numbers modulo 2**72: upper 64 bits, and lower 8, as int64. Lower ones may be sums of such,
    positive or negative, of which what exceeds 8 bits still counts."""

    upper: torch.Tensor
    lower: torch.Tensor

    def times(self, other: _Fine) -> _Fine:
        """The matrix product, if both have 8 lower bits."""
        upper = matmul(self.upper, (other.upper << FINER_BITS) | other.lower)
        return _Fine(upper + matmul(self.lower, other.upper), matmul(self.lower, other.lower))

    def minus(self, other: _Fine) -> _Fine:
        return _Fine(self.upper - other.upper, self.lower - other.lower)

    def plus(self, other: _Fine) -> _Fine:
        return _Fine(self.upper + other.upper, self.lower + other.lower)

    def normal(self) -> _Fine:
        """The same with 8 lower bits."""
        return _Fine(self.upper + (self.lower >> FINER_BITS), self.lower & _BYTE)


def finer_products(ctx: Context, weights: torch.Tensor, values: Masked) -> Protocol:
    """Shares modulo 2**64 of the matrix products of weights and values, without their 8 lower bits.

    In: shares modulo 2**96 of weights [..., M, L], as halves int32 [..., M, L, 3]; values [..., L,
    D], opened, below 2**62. Products must be below 2**70. Out: [..., M, D], rounded down or up at
    random with the right expectation, with eight fractional bits less than both have.

    Rounds 1: weights are opened, online 24 bytes for each. Offline, to the server alone, 10 bytes
    for each value, 1 for each value of each row of weights, and 9 for each result. Each party sees
    weights under masks that are fresh and uniform modulo 2**96. The server is sent bytes and words
    modulo 2**72 minus those of the client's stream: these are fresh, uniform and unknown to it, so
    what it sees is uniform, whatever the masks are. The client is sent nothing. Masks of values are
    shared once more, and nothing is opened under them again. Each party drops bits of its own
    share; the sum is the product rounded down or one less, and one unit is added. So roundings are
    fixed by bits of which each party knows its own (`rounding="public"`).
    """
    shape, features = weights.shape[:-1], values.shape[-1]
    results = (*shape[:-1], features)
    mask = ctx.long_mask(math.prod(shape), HALVES)
    again = _deal(ctx, values.shape, lambda: _unsigned(whole(values.mask)))
    tops = ctx.deal(values.shape, lambda: top_bit(whole(values.mask)), torch.int8)
    topped = ctx.deal(
        (*shape, features),
        lambda: (
            _of_halves(mask, shape).lower[..., None] * top_bit(whole(values.mask))[..., None, :, :]
        ),
        torch.int8,
    )
    cross = _deal(
        ctx,
        results,
        lambda: _of_halves(mask, shape).times(_unsigned(whole(values.mask))).normal(),
    )
    opened = yield from open_long(ctx, weights.reshape(-1, HALVES), mask)
    if again is None or cross is None or opened.is_meta:
        return ghost(results)
    z, r = _of_halves(opened, shape), _of_halves(mask, shape)
    lifted = whole(values.opened) + (1 << HEADROOM_BITS)
    public = _unsigned(lifted)
    public = _Fine(public.upper - (1 << (HEADROOM_BITS - FINER_BITS)), public.lower)
    # A value is public - hidden, but for the wrap of its mask, which is counted here and below.
    no_top = (lifted >= 0).long()
    hidden = _Fine(again.upper - _wrapped(no_top * tops), again.lower)
    mine = (z if ctx.party == CLIENT else _Fine(*map(torch.zeros_like, z))).minus(r).normal()
    total = mine.times(public).minus(z.times(hidden)).plus(cross).normal()
    wraps = (topped * no_top[..., None, :, :]).sum(-2)
    share = total.upper - _wrapped(wraps)
    return share + ctx.public(torch.ones_like(share))


def finer_products_cost(rows: int, values: Masked) -> Cost:
    """Cost of `finer_products` for `rows` rows of weights in total."""
    length, features = values.shape[-2:]
    dealt = (_DEALT + 1) * math.prod(values.shape) + rows * features * (length + _DEALT)
    return Cost(1, 8 * HALVES * rows * length, dealt)


def _wrapped(counts: torch.Tensor) -> torch.Tensor:
    """Upper 64 bits of 2**64 times these numbers, which count modulo 2**8."""
    return counts.long() << (RING_BITS - FINER_BITS)


def _unsigned(words: torch.Tensor) -> _Fine:
    """Words of 64 bits, as numbers that are not negative."""
    return _Fine(logical_shift(words, FINER_BITS), words & _BYTE)


def _of_halves(words: torch.Tensor, shape: Sequence[int]) -> _Fine:
    """The lower 72 bits of words modulo 2**96, int32 halves [n, 3], in another shape."""
    low, middle, high = (half.long() & ONES for half in words.unbind(-1))
    upper = (low >> FINER_BITS) | (middle << (HALF_BITS - FINER_BITS))
    upper = upper | (high << (2 * HALF_BITS - FINER_BITS))
    return _Fine(upper.reshape(shape), (low & _BYTE).reshape(shape))


def _of_bytes(table: torch.Tensor) -> _Fine:
    upper = table.new_empty((len(table), _DEALT - 1))
    upper.copy_(table[:, :-1])
    return _Fine(upper.view(torch.int64)[:, 0], table[:, -1].long())


def _deal(ctx: Context, shape: Sequence[int], secret: Callable[[], _Fine]) -> _Fine | None:
    """Shares modulo 2**72 of what `secret` returns; None at the dealer."""

    def correct(share: torch.Tensor) -> torch.Tensor:
        value = secret()
        flat = _Fine(value.upper.reshape(-1), value.lower.reshape(-1))
        left = flat.minus(_of_bytes(share)).normal()
        upper = left.upper.view(torch.uint8).reshape(-1, _DEALT - 1)
        return torch.cat([upper, left.lower[:, None].to(torch.uint8)], 1)

    table = ctx.deal_corrected((math.prod(shape), _DEALT), correct)
    if table is None:
        return None
    found = _of_bytes(table)
    return _Fine(found.upper.reshape(tuple(shape)), found.lower.reshape(tuple(shape)))
