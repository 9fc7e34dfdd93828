"""Cache rows of text that both parties know: they enter without a computation on shares."""

from __future__ import annotations

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, ToClient
from mergec.runtime.core.spec import CLIENT, SERVER
from mergec.runtime.core.values import Masked, Sent
from mergec.runtime.kernels.transfers import to_device


def enter(ctx: Context, words: torch.Tensor, frac: int, form: str) -> Protocol:
    """Rows that the server knows in the form of a cache, "masked" or "sent"; see below."""
    if form == "sent":
        return enter_sent(ctx, words, frac)
    return (yield from enter_masked(ctx, words, frac))


def enter_masked(ctx: Context, words: torch.Tensor, frac: int) -> Protocol:
    """Open rows v that the server knows as z = v + b, under a fresh mask b of the server's own.

    In: words, int64, the fixed-point integers of v at the server; meta tensors elsewhere. Out:
    Masked with `frac` fractional bits, of which the client's share of the mask is zero, the
    server's is b, and the dealer has b: the form in which an opened value enters a cache, so what
    reads the cache need not know how its rows came there.

    Rounds 1, online 8 bytes per element to the client, offline none: b is the next words of the
    server's stream, which the dealer expands, too.

    The client sees z, which is uniform: b is, is unknown to the client, and hides this value alone.
    It is the mask of these rows wherever they are read, as that of every opened value is. The
    server sees nothing, and knows v and b. A product with another opened value x + r hides r behind
    the client's share of what is dealt for r and b, which is a fresh word. The dealer sees nothing.
    """
    mask = ctx.server_mask(words.shape)
    ctx.spend(mask)
    if ctx.party == SERVER:
        opened = to_device(words, ctx.device, "input") + mask
        yield ToClient(opened)
        return Masked(opened, mask, frac)
    ghost = words.to("meta")
    opened = yield ToClient(ghost)
    if ctx.party == CLIENT:
        # The reply is a view of the whole message.
        return Masked(opened.clone(), torch.zeros_like(opened), frac)
    return Masked(ghost, mask, frac)


def enter_sent(ctx: Context, words: torch.Tensor, frac: int) -> Sent:
    """Rows that the server knows, in the form that is opened to the server alone: v - 0.

    The mask of that form hides a value from the server, which knows this one: it is zero. Nothing
    is sent, and nobody sees anything.
    """
    ghost = words.to("meta")
    if ctx.party == SERVER:
        return Sent(to_device(words, ctx.device, "input"), ghost, frac)
    return Sent(ghost, torch.zeros(words.shape, dtype=torch.int64, device=ctx.device), frac)
