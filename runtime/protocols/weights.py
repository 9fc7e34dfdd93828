"""Products with the server's constants, which send one message for the moving factor.

A constant is either shared between the two parties (`Masked`, see `shared_weights`) or held by the
server (`Weight`). In the second case W is hidden under a static mask B, known to server and dealer,
and the client receives W - B once per session. For a share x = xc + xs the client sends xc - a
under a fresh mask a. The server then knows x - a and computes (x - a) W, the client computes a (W -
B), and the dealer provides shares of a B. So W is opened once in its lifetime, and x is sent in one
direction only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, ToClient, ToServer
from mergec.runtime.core.spec import CLIENT, DEALER, SERVER, Cost
from mergec.runtime.core.values import (
    Expanded,
    Held,
    Masked,
    Sent,
    Shared,
    Weight,
    encode,
    scale_rows,
)
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.matmul import matmul_columns, matmul_rows
from mergec.runtime.kernels.spread import Spread, write_rows
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.opening import open_masked, open_masked_cost
from mergec.runtime.protocols.shared_weights import times_shared_weight

Constant = Weight | Masked
"""A constant in a product: held by the server, or shared."""

Moving = Sent | Masked
"""The other factor, in the form that the constant requires."""

PIECE = 1 << 22
"""Elements of a weight that are masked and sent at once."""


def send(ctx: Context, x: Shared) -> Protocol:
    """Open x to the server under a mask a that the client and the dealer know.

    In: Shared of any shape. Out: Sent. Rounds 1, online 8 bytes per element, offline none.
    The server sees x - a, which is uniform because a is fresh and uniform; the client sees nothing.
    """
    mask = ctx.client_mask(x.shape)
    ctx.spend(mask)
    if ctx.party == CLIENT:
        yield ToServer(x.share - mask)
        return Sent(ghost(x.shape), mask, x.frac)
    difference = yield ToServer(ghost(x.shape))
    opened = difference + x.share if ctx.party == SERVER else x.share
    return Sent(opened, mask, x.frac)


def send_cost(count: int) -> Cost:
    """Cost of `send` for `count` elements."""
    return Cost(rounds=1, online=8 * count)


def share_weight(
    ctx: Context, name: str, encoded: torch.Tensor, frac: int, kept: torch.Tensor | None = None
) -> Protocol:
    """Put a server-held constant under its static mask, once per session and name.

    In: int32 or int64 tensor at the server, meta elsewhere; kept: what `Context.keep_weight`
    returned for it, if it was called before. Out: Weight. Rounds 1 per PIECE
    elements, so that the server never holds a whole mask. Online 8 bytes per element, server to
    client. The client sees W - B, which is uniform because B is uniform and never masks another W.
    The server sees nothing.
    """
    unseen = ghost(encoded.shape)
    shapes = [piece.shape for piece in _pieces(unseen)]
    if ctx.party == DEALER:
        for shape in shapes:
            yield ToClient(ghost(shape))
        return Weight(unseen, unseen, ctx.kept_weight_mask(name, encoded.shape, shapes), frac)
    if ctx.party == SERVER:
        kept = ctx.keep_weight(encoded) if kept is None else kept
        source = encoded if isinstance(kept, Spread) else kept
        masks = ctx.weight_masks(name, shapes)
        for piece, mask in zip(_pieces(source), masks, strict=True):
            words = to_device(piece, ctx.device, "input")
            yield ToClient(torch.sub(words, mask, out=mask))
            if ctx.ranks is not None:
                ctx.ranks.release(piece)  # rank 0 has read what the others hold
        return Weight(kept, unseen, unseen, frac)
    difference = ctx.weight_room(encoded.shape)
    if isinstance(difference, Spread):
        start = 0
        for piece in _pieces(unseen):
            write_rows(difference, start, (yield ToClient(piece)))
            start += len(piece)
    else:
        for piece in _pieces(difference):
            piece.copy_((yield ToClient(piece)))
    return Weight(unseen, difference, unseen, frac)


def _pieces(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Split a weight into runs of rows of about PIECE elements; a scalar is one piece."""
    rows = max(1, PIECE // max(1, math.prod(weight.shape[1:])))
    return weight.split(rows) if weight.dim() else (weight,)


def reuse_weight(
    ctx: Context,
    encoded: torch.Tensor,
    difference: torch.Tensor,
    frac: int,
    kept: torch.Tensor | None = None,
) -> Weight:
    """What `share_weight` returns at client and server, without a message: the client kept W - B.

    kept: as in `share_weight`. difference: W - B under the same B of an earlier session, at the
    client; meta at the server. The caller ensures that B never hides another W
    (`runtime.session.stores.kept`).
    """
    unseen = ghost(encoded.shape)
    if ctx.party == SERVER:
        return Weight(ctx.keep_weight(encoded) if kept is None else kept, unseen, unseen, frac)
    return Weight(unseen, ctx.keep_weight(difference, mapped=True), unseen, frac)


def move(ctx: Context, x: Shared, weight: Constant) -> Protocol:
    """Open x for a product with `weight`: to both parties if it is shared, else to the server."""
    moved: Moving = yield from (open_masked if isinstance(weight, Masked) else send)(ctx, x)
    return moved


def move_cost(count: int, weight: Constant) -> Cost:
    """Cost of `move` for `count` elements."""
    return open_masked_cost(count) if isinstance(weight, Masked) else send_cost(count)


def times_weight(
    ctx: Context,
    x: Moving,
    weight: Constant,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Share of the bilinear `product(x, weight)` of shape `shape`: Rounds 0, offline 8 bytes per
    result. Raises TypeError if x is not in the form that the weight requires."""
    if isinstance(x, Masked) and isinstance(weight, Masked):
        return times_shared_weight(ctx, x, weight, product, shape)
    if not (isinstance(x, Sent) and isinstance(weight, Weight)):
        raise TypeError(f"a {type(x).__name__} cannot be multiplied by a {type(weight).__name__}")
    cross = ctx.deal(shape, lambda: _times_mask(product, x.mask, weight.mask))
    if ctx.party == DEALER:
        return cross
    if ctx.party == SERVER:
        return product(x.opened, weight.encoded) + cross
    return product(x.mask, weight.difference) + cross


def _times_mask(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    mask: torch.Tensor | Expanded,
) -> torch.Tensor:
    """`product(x, mask)`. Of a mask that is expanded for it, a piece is in memory at a time."""
    if isinstance(mask, torch.Tensor):
        return product(x, mask)
    if product is matmul_rows:
        return torch.cat([matmul_rows(x, piece) for piece in mask.pieces()], -1)
    if product is matmul_columns:
        total, start = torch.zeros((), dtype=torch.int64, device=x.device), 0
        for piece in mask.pieces():
            total = total + matmul_columns(x[..., start : start + len(piece)], piece)
            start += len(piece)
        return total
    return product(x, torch.cat([*mask.pieces()]))


def linear(ctx: Context, x: Moving, weight: Constant) -> torch.Tensor:
    """Share of x @ weight.T for x [..., I] and weight [O, I]: [..., O]. Cost: `times_weight`."""
    shape = (*x.shape[:-1], weight.shape[0])
    return times_weight(ctx, x, weight, matmul_rows, shape)


def table_rows(ctx: Context, ids: torch.Tensor, weight: Constant) -> Protocol:
    """Shares of the rows of `weight` [V, D] selected by the client's ids [...]: [..., D].

    In: ids at the client, meta elsewhere. Rounds 1, online 8 V bytes per id, client to server;
    offline 8 D bytes per id. The server sees one-hot rows e minus a fresh uniform mask a, which are
    uniform; the client sees nothing. For a shared constant, e W = e z - (e - a) B - a B, where
    z = W + B is open and a B is dealt; the client computes e z by selecting rows of z. An id
    outside of the table selects zeros: failing would tell the server about the id.
    """
    mask = ctx.client_mask((*ids.shape, weight.shape[0]))
    ctx.spend(mask)
    away = ghost(mask.shape)
    if ctx.party == CLIENT:
        # Avoid building one-hot rows: for a prompt, each would have as many words as the
        # vocabulary.
        chosen, inside = _clamped(to_device(ids, ctx.device, "input"), weight.shape[0])
        rows = (-mask).scatter_add_(-1, chosen[..., None], inside[..., None])
        yield ToServer(rows)
    else:
        rows = yield ToServer(away)
    sent = Sent(rows if ctx.party == SERVER else away, mask, 0)
    shape = (*ids.shape, weight.shape[1])
    if not isinstance(weight, Masked):
        return times_weight(ctx, sent, weight, matmul_columns, shape)
    cross = ctx.deal(shape, lambda: matmul_columns(sent.mask, weight.mask))
    if ctx.party == DEALER:
        return cross
    if ctx.party == SERVER:
        return -matmul_columns(sent.opened, weight.mask) - cross
    hidden = matmul_columns(rows, weight.mask) + cross
    return weight.opened[chosen] * inside[..., None] - hidden


def _clamped(ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids moved into the table of that many rows, and 1 for each that was inside, else 0."""
    whole = ids.long()
    chosen = whole.clamp(0, count - 1)
    return chosen, (chosen == whole).long()


def table_rows_cost(count: int, weight: Constant) -> Cost:
    """Cost of `table_rows` for `count` ids."""
    vocabulary, features = weight.shape
    return send_cost(count * vocabulary) + Cost(offline=8 * count * features)


def scale_by(ctx: Context, x: Moving, weight: Constant) -> torch.Tensor:
    """Share of the element-wise product of x [..., D] and weight, broadcast."""
    shape = np.broadcast_shapes(x.shape, weight.shape)
    return times_weight(ctx, x, weight, torch.mul, shape)


def add_held(
    share: torch.Tensor, held: Held | Shared, frac: int, parts: Sequence[int] = ()
) -> torch.Tensor:
    """The share plus a constant. If held, its holder adds it; if shared, each adds its share.

    Shapes broadcast. parts: columns with more than `frac` fractional bits, see `mpc.linear`.
    """
    shape = np.broadcast_shapes(share.shape, held.shape)
    if share.is_meta:
        return ghost(shape)
    if isinstance(held, Shared):
        words = scale_rows(held.share << (frac - held.frac), parts)
    elif held.value.is_meta:
        return share.expand(shape)
    else:
        words = to_device(encode(scale_rows(held.value, parts), frac), share.device, "input")
    return share + words
