"""Products with server-held constants: one message, from the client to the server.

The server's constant W is hidden under a static mask B, known to server and dealer. W - B is given
to the client once in a session. For a share x = xc + xs the client sends xc - a under a fresh mask
a; the server then knows x - a and forms (x - a) W, the client a (W - B), and the dealer gives them
shares of a B. So W is opened once in its lifetime, and x moves in one direction only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.context import Context
from runtime.kernels.matmul import matmul_columns, matmul_rows
from runtime.messages import Protocol, ToClient, ToServer
from runtime.spec import CLIENT, DEALER, SERVER, Cost
from runtime.values import Held, Sent, Shared, Weight, encode


def send(ctx: Context, x: Shared) -> Protocol:
    """Open x to the server under a mask a that the client and the dealer know.

    In: Shared of any shape. Out: Sent. Rounds 1, online 8 bytes per element, offline none.
    The server sees x - a, uniform as a is fresh; the client sees nothing.
    """
    mask = ctx.client_mask(x.shape)
    if ctx.party == CLIENT:
        yield ToServer(x.share - mask)
        return Sent(torch.empty(x.shape, dtype=torch.int64, device="meta"), mask, x.frac)
    difference = yield ToServer(torch.empty(x.shape, dtype=torch.int64, device="meta"))
    opened = difference + x.share if ctx.party == SERVER else x.share
    return Sent(opened, mask, x.frac)


def send_cost(count: int) -> Cost:
    """Cost of `send` for `count` elements."""
    return Cost(rounds=1, online=8 * count)


def share_weight(ctx: Context, name: str, encoded: torch.Tensor, frac: int) -> Protocol:
    """Put a server-held constant under its static mask: once in a session, by name.

    In: int32 or int64 tensor at the server, meta elsewhere. Out: Weight. Rounds 1, online 8 bytes
    per element, server to client. The client sees W - B, uniform as B is and opened this once.
    """
    mask = ctx.weight_mask(name, encoded.shape)
    if ctx.party == DEALER:
        yield ToClient(encoded)
        return Weight(encoded, encoded, mask, frac)
    if ctx.party == SERVER:
        yield ToClient(encoded.to(torch.int64) - mask)
        ghost = torch.empty(encoded.shape, dtype=torch.int64, device="meta")
        return Weight(encoded, ghost, ghost, frac)
    difference = yield ToClient(torch.empty(encoded.shape, dtype=torch.int64, device="meta"))
    return Weight(encoded, difference, mask, frac)


def times_weight(
    ctx: Context,
    x: Sent,
    weight: Weight,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Share of the bilinear `product(x, weight)`: no rounds, offline 8 bytes per result."""
    cross = ctx.deal(shape, lambda: product(x.mask, weight.mask))
    if ctx.party == DEALER:
        return cross
    if ctx.party == SERVER:
        return product(x.opened, weight.encoded) + cross
    return product(x.mask, weight.difference) + cross


def linear(ctx: Context, x: Sent, weight: Weight) -> torch.Tensor:
    """Share of x @ weight.T for x [..., I] and weight [O, I]."""
    shape = (*x.shape[:-1], weight.shape[0])
    return times_weight(ctx, x, weight, matmul_rows, shape)


def table_rows(ctx: Context, x: Sent, weight: Weight) -> torch.Tensor:
    """Share of x @ weight for x [..., V] and weight [V, D]."""
    shape = (*x.shape[:-1], weight.shape[1])
    return times_weight(ctx, x, weight, matmul_columns, shape)


def scale_by(ctx: Context, x: Sent, weight: Weight) -> torch.Tensor:
    """Share of the element-wise product of x [..., D] and weight, broadcast."""
    shape = tuple(torch.broadcast_shapes(x.shape, weight.shape))
    return times_weight(ctx, x, weight, torch.mul, shape)


def add_held(share: torch.Tensor, held: Held, frac: int) -> torch.Tensor:
    """The share plus a value that one party holds, who adds it alone; shapes broadcast."""
    shape = torch.broadcast_shapes(share.shape, held.shape)
    if share.is_meta:
        return torch.empty(shape, dtype=torch.int64, device="meta")
    if held.value.is_meta:
        return share.expand(shape)
    return share + encode(held.value, frac).to(share.device)
