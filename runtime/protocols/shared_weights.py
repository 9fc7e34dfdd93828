"""Constants that are secret-shared between the two parties, under static masks.

The server knows each constant W at the start of a session and shares it then. A constant that is
only added is split into W - s and s, where the words s come from a seed that the client chooses and
sends to the server. A constant that takes part in products is opened once, as z = W + s + B: s is
the client's share of its static mask, and B, from the server's own seed, is the server's share. z
tells the server nothing new, because as the owner of W it already knows W, s and B. The client sees
z, which is uniform because B is. From then on neither party uses W itself, and each product opens
only the other factor, to both parties.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, ToClient, ToServer
from mergec.runtime.core.spec import CLIENT, DEALER, SERVER
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_host
from mergec.runtime.protocols.local import as_share

_SEED_BYTES = 32


def tell_constant_seed(ctx: Context) -> Protocol:
    """The client sends the server the seed of `Context.constant_words`: 1 round, 32 bytes.

    The words need not be secret from any role. What hides a constant from the client is the
    server's part of the mask, or the server's share.
    """
    seed = ctx.constant_seed
    if ctx.party == CLIENT and seed is not None:
        yield ToServer(torch.frombuffer(bytearray(seed), dtype=torch.uint8))
        return
    told = yield ToServer(ghost((_SEED_BYTES,), dtype=torch.uint8))
    if ctx.party == SERVER:
        ctx.constant_seed = to_host(told, "message").numpy().tobytes()


def share_constant(ctx: Context, name: str, encoded: torch.Tensor, frac: int) -> Shared:
    """Shares of a server constant that is only added; no message is sent.

    In: int32 or int64 at the server, meta elsewhere. The client's share is `constant_words`, which
    are uniform and independent of the constant.
    """
    if ctx.party == DEALER:
        return Shared(encoded, frac)
    words = ctx.constant_words(f"share {name}", encoded.shape)
    return Shared(encoded - words if ctx.party == SERVER else words, frac)


def open_constant(ctx: Context, name: str, encoded: torch.Tensor, frac: int) -> Protocol:
    """Open the server's constant to both parties under its static mask, once per session and name.

    In: int32 or int64 at the server, meta elsewhere. Out: Masked. Rounds 1, online 8 bytes per
    element, server to client. The client sees W + s + B, which is uniform because B is uniform and
    used for this opening alone. The server sees nothing.
    """
    mine = ctx.constant_words(f"mask {name}", encoded.shape)
    if ctx.party == DEALER:
        yield ToClient(encoded)
        mask = mine + ctx.weight_mask(name, encoded.shape)
        return Masked(encoded, ctx.keep_weight(mask), frac)
    if ctx.party == SERVER:
        mask = ctx.weight_mask(name, encoded.shape)
        opened = mine.add_(mask).add_(encoded)
        yield ToClient(opened)
    else:
        opened = yield ToClient(ghost(encoded.shape))
        mask = mine
    return Masked(ctx.keep_weight(opened), ctx.keep_weight(mask), frac)


def times_shared_weight(
    ctx: Context,
    x: Masked,
    weight: Masked,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Share of the bilinear `product(x, weight)`. Rounds 0, offline 8 bytes per result.

    x W = x z - x' B + a B, where z = W + B and x' = x + a are open and a B is dealt. Unlike
    `combine` this does not copy the weight. The dealt words are fresh for each product, so B may be
    used again.
    """
    cross = ctx.deal(shape, lambda: product(x.mask, weight.mask))
    if ctx.party == DEALER:
        return cross
    mine = as_share(ctx, x, x.frac)
    return product(mine, weight.opened) - product(x.opened, weight.mask) + cross
