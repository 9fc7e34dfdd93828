"""Multiplication of two shared values with Beaver triples (Beaver, CRYPTO 1991)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.core.values import Masked
from mergec.runtime.kernels.matmul import matmul
from mergec.runtime.protocols.opening import open_under


def multiply(ctx: Context, *pairs: tuple[torch.Tensor, torch.Tensor]) -> Protocol:
    """Multiply several pairs of shared tensors element-wise, all in one round.

    In: pairs (x, y) of additive shares modulo 2**64, broadcast against each other. Out: a list with
    one share per product; its fractional bits are the sum of those of x and y. Rounds 1. Online 16
    bytes per element of each factor, offline 8 bytes per element of each product.
    Each party sees x + a and y + b, which are uniform because the masks a and b are fresh and
    uniform modulo 2**64.
    """
    masks = [(ctx.mask(x.shape), ctx.mask(y.shape)) for x, y in pairs]
    opened = yield from together(
        *(
            open_under(ctx, share, mask)
            for pair, pair_masks in zip(pairs, masks, strict=True)
            for share, mask in zip(pair, pair_masks, strict=True)
        )
    )
    products = []
    for (a, b), x, y in zip(masks, opened[::2], opened[1::2], strict=True):
        products.append(product_of_masked(ctx, Masked(x, a, 0), Masked(y, b, 0)))
    return products


def multiply_cost(*sizes: tuple[int, int, int]) -> Cost:
    """Cost of `multiply`. Each size holds the element counts of x, of y and of their product."""
    return Cost(
        rounds=1,
        online=sum(16 * (x + y) for x, y, _ in sizes),
        offline=sum(8 * product for _, _, product in sizes),
    )


def product_of_masked(ctx: Context, x: Masked, y: Masked) -> torch.Tensor:
    """Share of the element-wise product of two masked values that are already open.

    With x' = x + a and y' = y + b public and a b dealt as a share,
    x y = (x' - a)(y' - b) = x' y' - x' b - a y' + a b. Rounds 0, offline 8 bytes per element of the
    product. Neither party receives a message.
    """
    shape = np.broadcast_shapes(x.shape, y.shape)
    cross = ctx.deal(shape, lambda: x.mask * y.mask)
    return combine(ctx, x, y, cross, torch.mul)


def matmul_of_masked(ctx: Context, x: Masked, y: Masked) -> torch.Tensor:
    """Share of the batched matrix product x @ y of two masked values that are already open.

    In: x [..., M, K], y [..., K, N]. Out: [..., M, N]. Rounds 0, offline 8 bytes per element of the
    result.
    """
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    shape = (*batch, x.shape[-2], y.shape[-1])
    cross = ctx.deal(shape, lambda: matmul(x.mask, y.mask))
    return combine(ctx, x, y, cross, matmul)


def combine(
    ctx: Context,
    x: Masked,
    y: Masked,
    cross: torch.Tensor,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """x' y' - x' [b] - [a] y' + [a b] for any bilinear product, with two products instead of three.

    y is usually the larger factor (a cache), so no temporary of its size is allocated.
    """
    if cross.is_meta:
        return cross
    mine = x.opened - x.mask if ctx.party == CLIENT else -x.mask
    return product(mine, y.opened) - product(x.opened, y.mask) + cross
