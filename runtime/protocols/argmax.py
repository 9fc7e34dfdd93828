"""The best few of a row of candidates, by comparing all pairs of a group at once.

Candidates have a secret key and a label, which is at first their position and later a secret
number. The keys of a group are opened under masks, z_i = x_i + r_i modulo 2**32; once the labels
are secret, so are they, y_i = l_i + s_i. For each pair the dealer shares the digit tables of r_i -
r_j, so [x_i < x_j] follows from z_i - z_j (`digits`, `formula`). The number of comparisons that a
candidate loses is its rank. The ranks of a group are 0, 1, 2, ...; of equal keys the first one
wins. Ranks are opened under masks rho, and looked up in shared one-hot rows of rho and in the same
rows times r_i and s_i. So for each place t among the best, the sums over i of [rank_i = t] x_i and
of [rank_i = t] l_i are public linear combinations of dealt words. Three rounds reduce a group to
its best candidates. The winners of all groups are the candidates of the next level.

`peak` finds the integer part of a maximum in the same way. Here keys have 32 bits and labels, and
there may be more than one winner. Source: the digit-wise comparison of Garay, Schoenmakers and
Villegas (PKC 2007) with the one-time truth tables of Ishai et al. (TCC 2013).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.ranks import pairs_within, ranked, ranked_cost

LOWEST = -(2**30)
"""Key of the entries that pad a group. All other keys must be larger, and below 2**30."""

SIZES = (4, 8, 16, 32, 64)
"""Group sizes that `plans` tries. A rank is opened in one byte."""


@dataclass
class Candidates:
    """Rows of candidates. keys: int32 share [R, n]. labels: the same, or None for positions."""

    keys: torch.Tensor
    labels: torch.Tensor | None = None


def best(ctx: Context, candidates: Candidates, keep: int, sizes: Sequence[int]) -> Protocol:
    """The `keep` largest keys of each row with their labels, largest first: Candidates [R, keep].

    In: keys in (-2**30, 2**30) as shares modulo 2**32, more of them than `keep`. sizes: group
    sizes, level by level, powers of two larger than `keep`; the last must leave one group,
    otherwise ValueError. Of equal keys the first comes first. Rounds 3 per level. Online 10 bytes
    per candidate (18 from the second level on) and 2 per pair. Offline 290 bytes per pair, and 8
    (12) bytes per candidate times the size of its group. Each party sees keys, labels, bits and
    ranks, each under fresh, uniform masks.
    """
    for size in sizes:
        candidates = yield from _level(ctx, candidates, keep, size)
    if candidates.keys.shape[1] != keep:
        raise ValueError(f"groups of {list(sizes)} leave {candidates.keys.shape[1]} candidates")
    return candidates


def best_cost(rows: int, count: int, keep: int, sizes: Sequence[int]) -> Cost:
    """Cost of `best` for `rows` rows of `count` candidates whose labels are their positions."""
    return _cost(rows, count, keep, sizes, secret_labels=False)


def again_cost(rows: int, count: int, keep: int, sizes: Sequence[int]) -> Cost:
    """Cost of `best` for candidates with secret labels."""
    return _cost(rows, count, keep, sizes, secret_labels=True)


def _cost(rows: int, count: int, keep: int, sizes: Sequence[int], *, secret_labels: bool) -> Cost:
    total = Cost()
    for size in sizes:
        groups = -(-count // size)
        members, pairs = rows * groups * size, rows * groups * size * (size - 1) // 2
        words = 3 if secret_labels else 2
        total += ranked_cost(pairs, members)
        total += Cost(
            rounds=1, online=8 * (words - 1) * members, offline=4 * words * size * members
        )
        count, secret_labels = groups * keep, True
    return total


def plans(count: int, least: int = SIZES[0]) -> Iterator[tuple[int, ...]]:
    """Group sizes by level that reduce `count` candidates to one; only the last may be smaller."""
    if count <= SIZES[-1]:
        yield (_power_of_two(count),)
    for size in SIZES:
        if least <= size < count:
            for rest in plans(-(-count // size), size):
                yield (size, *rest)


def plan_for(count: int, keep: int) -> tuple[int, ...]:
    """Sizes of groups that reduce `count` candidates to `keep`, to about a quarter per level."""
    size, sizes = 4 * _power_of_two(keep), []
    while count > size:
        sizes.append(size)
        count = -(-count // size) * keep
    return (*sizes, _power_of_two(count))


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least 2 and not below `count`."""
    return 1 << max(1, (count - 1).bit_length())


def _level(ctx: Context, candidates: Candidates, keep: int, size: int) -> Protocol:
    keys = _grouped(ctx, candidates.keys, size, LOWEST)
    pairs = pairs_within(keys.numel() // size, size)
    masks = [ctx.mask(keys.shape, torch.int32)]
    openings = [open_under(ctx, keys, masks[0])]
    if candidates.labels is not None:
        labels = _grouped(ctx, candidates.labels, size, 0)
        masks.append(ctx.mask(keys.shape, torch.int32))
        openings.append(open_under(ctx, labels, masks[1]))

    rank_mask = ctx.mask(keys.shape, torch.int8)
    shape = (*keys.shape, 1 + len(masks), size)
    rows = ctx.deal(shape, lambda: pairs.one_hot(rank_mask, *masks), torch.int32)
    opened, rank = yield from ranked(ctx, pairs, openings, lambda: masks[0], rank_mask)
    if keys.is_meta:
        left = ghost((len(keys), keys.shape[1] * keep), dtype=torch.int32)
        return Candidates(left, left)
    # [R, groups, size, 1 + masks, keep]: [rank = t], alone and times each mask.
    slots = (rank.long()[..., None] - torch.arange(keep, device=rank.device)) & (size - 1)
    chosen = rows.gather(-1, slots[..., None, :].expand(*rows.shape[:-1], keep))
    winning = [
        _winners(known, chosen[..., 0, :], chosen[..., 1 + i, :]) for i, known in enumerate(opened)
    ]
    if candidates.labels is None:
        places = torch.arange(keys[0].numel(), dtype=torch.int32, device=keys.device)
        places = places.reshape(1, *keys.shape[1:])
        winning.append(_winners(places, chosen[..., 0, :], torch.zeros_like(chosen[..., 0, :])))
    return Candidates(*winning)


def _grouped(ctx: Context, share: torch.Tensor, size: int, filling: int) -> torch.Tensor:
    """Groups of `size`, the last one padded with a public number: [R, groups, size]."""
    missing = -share.shape[1] % size
    filled = torch.nn.functional.pad(share, (0, missing))
    if missing and ctx.party == CLIENT:
        filled[:, -missing:] = filling
    return filled.reshape(len(share), -1, size)


def _winners(known: torch.Tensor, chosen: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The sum over each group of [rank = t] (known - mask): int32 share [R, groups * keep]."""
    total = known[..., None] * chosen - masked
    return total.sum(-2, dtype=torch.int32).reshape(len(chosen), -1)
