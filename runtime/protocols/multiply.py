"""Products of two shared values by Beaver triples (Beaver, CRYPTO 1991)."""

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
    """Shares of the element-wise products x * y of several pairs, in one round.

    In: pairs of additive shares modulo 2**64, broadcast against each other. Out: list of shares of
    the products, with the sum of the fractional bits. Rounds 1, online 16 bytes per element of
    each factor, offline 8 bytes per element of each product.
    Each party sees x + a and y + b; a and b are fresh and uniform.
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
    for index, (a, b) in enumerate(masks):
        x, y = opened[2 * index : 2 * index + 2]
        products.append(product_of_masked(ctx, Masked(x, a, 0), Masked(y, b, 0)))
    return products


def multiply_cost(*sizes: tuple[int, int, int]) -> Cost:
    """Cost of `multiply`; for each pair the element counts of x, of y and of their product."""
    return Cost(
        rounds=1,
        online=sum(16 * (x + y) for x, y, _ in sizes),
        offline=sum(8 * product for _, _, product in sizes),
    )


def product_of_masked(ctx: Context, x: Masked, y: Masked) -> torch.Tensor:
    """Share of the element-wise product of two opened wires: no rounds, offline 8 bytes each.

    x y = (x' - a)(y' - b) = x' y' - x' b - a y' + a b with x', y' public and a b dealt.
    """
    shape = np.broadcast_shapes(x.shape, y.shape)
    cross = ctx.deal(shape, lambda: x.mask * y.mask)
    return combine(ctx, x, y, cross, torch.mul)


def matmul_of_masked(ctx: Context, x: Masked, y: Masked) -> torch.Tensor:
    """Share of the batched matrix product of two opened wires; offline 8 bytes per result."""
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
    """x' y' - x' [b] - [a] y' + [a b] for any bilinear product, in two products, not three.

    The larger factor is usually the second, a cache: nothing of its size is made here.
    """
    if cross.is_meta:
        return cross
    mine = x.opened - x.mask if ctx.party == CLIENT else -x.mask
    return product(mine, y.opened) - product(x.opened, y.mask) + cross
