"""Openings of shared values under a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, Swap, ToClient, ToServer
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.long import added
from mergec.runtime.kernels.transfers import integers

_WORD_BITS = 32


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


def open_long(ctx: Context, share: torch.Tensor, mask: torch.Tensor) -> Protocol:
    """`open_under` for words modulo 2**(32 H) as 32-bit halves, int32 [n, H].

    mask: from `Context.long_mask`. Rounds 1, online 8 H bytes per word. z is uniform modulo
    2**(32 H), because r is fresh and uniform there.
    """
    ctx.spend(mask)
    if share.is_meta:
        yield Swap(share)
        return share
    mine = added(share, mask)
    other = yield Swap(mine)
    return added(mine, other)


def open_high(
    ctx: Context,
    share: torch.Tensor,
    mask: torch.Tensor,
    hidden: int | Sequence[int],
    offset: int = 0,
) -> Protocol:
    """Open z = x + offset + r for a protocol that reads no bit of z below `hidden`.

    In: 64-bit share; r must be fresh. hidden: a number of bits, or one for each index of the last
    dimension. Out: z, whose bits below `hidden` mean nothing.

    With public rounding this is `open_under`. With exact rounding (`Context.exact`) the client
    sends its masked share, and the server answers with the bits of z from `hidden` on: rounds 2,
    online 8 bytes per element one way and 4, 6 or 8 the other. Both parties' results have zeros
    below.

    What is hidden decides how z >> hidden rounds x: up or down by the carry out of the low bits of
    x + r. The client sees the high bits, which are uniform as z is. Its view holds nothing of the
    server's summand of the low bits of r, which is uniform. So to the client the carry is a coin
    with odds that depend on x alone, and is independent of all else that it sees. The server sees
    z, which is uniform whatever x is, and no output.
    """
    every = [hidden] if isinstance(hidden, int) else list(hidden)
    if not ctx.exact or max(every) <= 0:
        return (yield from open_under(ctx, share, mask, offset))
    ctx.spend(mask)
    if ctx.party == CLIENT:
        yield ToServer(share + mask + offset)
        ghosts = _split(ghost(share.shape), min(every))
        parts = yield tuple(map(ToClient, ghosts))
        return _join(parts)
    theirs = yield ToServer(share if share.is_meta else share.to("meta"))
    if share.is_meta:
        parts = _split(share, min(every))
        ctx.cover(parts)
        yield tuple(map(ToClient, parts))
        return share
    low = integers(tuple(max(0, bits) for bits in every), share.device)
    opened = (theirs + share + mask) >> low << low
    yield tuple(map(ToClient, _split(opened, min(every))))
    return opened


def _split(words: torch.Tensor, hidden: int) -> list[torch.Tensor]:
    """The parts of 64-bit words that hold bits from `hidden` on: 4, 6 or 8 bytes of each."""
    parts = [(words >> _WORD_BITS).to(torch.int32)]
    if hidden < _WORD_BITS // 2:
        parts.append(words.to(torch.int32))
    elif hidden < _WORD_BITS:
        parts.append((words >> (_WORD_BITS // 2)).to(torch.int16))
    return parts


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    words = parts[0].long() << _WORD_BITS
    for part in parts[1:]:
        bits = 8 * part.element_size()
        words |= (part.long() & ((1 << bits) - 1)) << (_WORD_BITS - bits)
    return words


@dataclass(frozen=True)
class Cut:
    """Shares of which 32 bits are to be opened, those from `drop` on.

    share: int32 [...] if the bits below were dropped locally, and then drop is 0; or int64. hidden:
    the bits that the client must not see; at least `drop`. Raises ValueError if `drop` is not in 0
    to 32.
    """

    share: torch.Tensor
    drop: int = 0
    hidden: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= _WORD_BITS:
            raise ValueError(f"of 64 bits no window of 32 begins at bit {self.drop}")

    def mask(self, ctx: Context) -> torch.Tensor:
        """A fresh mask for `open`, flattened to [n]."""
        return ctx.mask((self.share.numel(),), torch.int64 if self.drop else torch.int32)

    def narrow(self, mask: torch.Tensor) -> torch.Tensor:
        """The 32 bits of the mask that lie on the opened ones, int32 [n]: for the dealer."""
        return (mask >> self.drop).to(torch.int32) if self.drop else mask

    def open(self, ctx: Context, mask: torch.Tensor, offset: int = 0) -> Protocol:
        """The opened bits, int32 [n]: x >> drop, plus offset, plus `narrow(mask)`, or one more.

        Rounds, bytes and what each party sees: see `open_under` for a share of 32 bits, and
        `open_high` for one of 64.
        """
        flat = self.share.reshape(-1)
        if not self.drop:
            return (yield from open_under(ctx, flat, mask, offset))
        opened = yield from open_high(ctx, flat, mask, self.hidden, offset << self.drop)
        return (opened >> self.drop).to(torch.int32)


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
