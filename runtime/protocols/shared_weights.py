"""Constants that are secret-shared between the two parties, under static masks.

The server knows each constant W at the start of a session and shares it then. A constant that is
only added is split into W - s and s, where s are words that both know from a seed of the client's.
One that takes part in products is opened once, as z = W + s + B, where s is the client's share of
its static mask and B, from the server's own seed, the server's. The server could not learn B + s
from z, as it knows them already: it is the owner of W. The client sees z, which is uniform as B is.
From then on neither party uses W itself, and each product opens the other factor alone, to both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, ToClient, ToServer
from mergec.runtime.core.spec import CLIENT, DEALER, SERVER
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.protocols.local import as_share

_SEED_BYTES = 32


def tell_constant_seed(ctx: Context) -> Protocol:
    """The client tells the server the seed of `Context.constant_words`: 1 round, 32 bytes.

    The words only have to be unknown to nobody: what hides a constant from the client is the
    server's part of the mask, or the server's share.
    """
    seed = ctx.constant_seed
    if ctx.party == CLIENT and seed is not None:
        yield ToServer(torch.frombuffer(bytearray(seed), dtype=torch.uint8))
        return
    told = yield ToServer(torch.empty(_SEED_BYTES, dtype=torch.uint8, device="meta"))
    if ctx.party == SERVER:
        ctx.constant_seed = told.numpy().tobytes()


def share_constant(ctx: Context, name: str, encoded: torch.Tensor, frac: int) -> Shared:
    """Shares of the server's constant, made without a message: for one that is only added.

    In: int32 or int64 at the server, meta elsewhere. The client's share is `constant_words`,
    uniform and independent of the constant.
    """
    if ctx.party == DEALER:
        return Shared(encoded, frac)
    words = ctx.constant_words(f"share {name}", encoded.shape)
    return Shared(encoded - words if ctx.party == SERVER else words, frac)


def open_constant(ctx: Context, name: str, encoded: torch.Tensor, frac: int) -> Protocol:
    """Open the server's constant to both under its static mask: once in a session, by name.

    In: int32 or int64 at the server, meta elsewhere. Out: Masked. Rounds 1, online 8 bytes per
    element, server to client. The client sees W + s + B, uniform as B is and opened this once.
    """
    mine = ctx.constant_words(f"mask {name}", encoded.shape)
    if ctx.party == DEALER:
        yield ToClient(encoded)
        return Masked(encoded, mine + ctx.weight_mask(name, encoded.shape), frac)
    if ctx.party == SERVER:
        mask = ctx.weight_mask(name, encoded.shape)
        opened = mine.add_(mask).add_(encoded)
        yield ToClient(opened)
        return Masked(opened, mask, frac)
    opened = yield ToClient(torch.empty(encoded.shape, dtype=torch.int64, device="meta"))
    return Masked(opened, mine, frac)


def times_shared_weight(
    ctx: Context,
    x: Masked,
    weight: Masked,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Share of the bilinear `product(x, weight)`: no rounds, offline 8 bytes per result.

    x W = x z - x' B + a B with z = W + B and x' = x + a open and a B dealt. Unlike `combine` this
    makes no copy of the weight. The words that the dealer gives are fresh, so B may serve again.
    """
    cross = ctx.deal(shape, lambda: product(x.mask, weight.mask))
    if ctx.party == DEALER:
        return cross
    mine = as_share(ctx, x, x.frac)
    return product(mine, weight.opened) - product(x.opened, weight.mask) + cross
