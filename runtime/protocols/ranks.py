"""Ranks of group members, from comparisons of all pairs; for `peak`, `argmax` and `top_k`.

Exactly one member of a group has each rank. Ranks are opened under masks rho and looked up in
shared one-hot rows of rho. A row holds [rank = t] for each t. The same row times the mask of the
member's value makes [rank = t] times the value a public linear combination of dealt words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, Swap, together
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.compare import DIGITS, LESS_THAN
from mergec.runtime.protocols.formula import open_bits


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which of n members are compared.

    first, second: positions of each pair's members, int32 [pairs]. members: n. entries: length of a
    one-hot row, a power of two larger than any rank.
    """

    first: np.ndarray
    second: np.ndarray
    members: int
    entries: int

    def differences(self, words: torch.Tensor) -> torch.Tensor:
        """The first member's word minus the second's, as int64 [pairs], from words of n members."""
        found: torch.Tensor = _DIFFERENCES(words, self)
        return found

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`first` and `second` on a device, as int64."""
        return _members(self, device)

    def one_hot(self, mask: torch.Tensor, *payload: torch.Tensor) -> torch.Tensor:
        """One-hot rows of rank masks, times one and each payload [n]. Called by the dealer.

        Returns [n, 1 + payloads, entries], of the payload's type.
        """
        words = torch.stack([torch.ones_like(payload[0]), *payload], -1)
        rows: torch.Tensor = _ONE_HOT(mask, words.reshape(self.members, -1), self.entries)
        return rows

    def open_ranks(self, ctx: Context, less: torch.Tensor, mask: torch.Tensor) -> Protocol:
        """Open how many comparisons each member lost, plus its mask, modulo 256: int8.

        less: shares modulo 2**8 of [first < second], int8 [pairs]. Rounds 1, online 2 bytes per
        member. Each party sees the opened numbers, which are uniform modulo 256 because the mask is
        uniform and fresh. Raises RuntimeError if the mask was used before.
        """
        ctx.spend(mask)
        if less.is_meta:
            yield Swap(ghost(mask.shape, dtype=torch.int8))
            return less
        mine = _LOSSES(mask, less, self, int(ctx.party == CLIENT))
        other = yield Swap(mine)
        return mine + other


@lru_cache(maxsize=8)
def pairs_within(groups: int, size: int) -> Pairs:
    """All pairs within each of `groups` consecutive groups of `size` members."""
    starts = size * np.arange(groups, dtype=np.int32)[:, None]
    ends = torch.triu_indices(size, size, 1, dtype=torch.int32).numpy()
    first, second = ((starts + end).reshape(-1) for end in ends)
    return Pairs(first, second, size * groups, 1 << (size - 1).bit_length())


def ranked(
    ctx: Context,
    pairs: Pairs,
    openings: Sequence[Protocol],
    mask: Callable[[], torch.Tensor],
    rank_mask: torch.Tensor,
) -> Protocol:
    """Open keys under masks, and then their ranks.

    openings: protocols that run beside each other, the first of which opens the keys of all members
    as int32; differences of keys are in [-2**31, 2**31). mask: the masks of these keys, int32;
    called by the dealer only. rank_mask: int8, from `Context.mask`. Returns what the openings
    return, and the opened ranks, int8; a larger key has a smaller rank, and so has the first of
    equal ones. Rounds 2 more than the openings. Cost besides: `ranked_cost`. Each party sees what
    the openings show, bits and ranks, the latter two under fresh, uniform masks.
    """
    count = len(pairs.first)
    tables = DIGITS.deal(ctx, count, lambda: pairs.differences(mask()))
    bit_mask = ctx.mask_bits((count,))
    words = LESS_THAN.deal(ctx, bit_mask, dtype=torch.int8)
    opened = yield from together(*openings)
    keys = opened[0]
    # Shares of [x_i < x_j] modulo 2**8.
    points = tables[:, 0] if keys.is_meta else pairs.differences(keys)
    bits = yield from open_bits(ctx, DIGITS.look_up(points, tables), bit_mask)
    less = LESS_THAN.evaluate(bits, words)[:, 0]
    rank = yield from pairs.open_ranks(ctx, less, rank_mask)
    return opened, rank


def ranked_cost(pairs: int, members: int) -> Cost:
    """Cost of `ranked` without its openings."""
    return Cost(
        rounds=2,
        online=2 * pairs + 2 * members,
        offline=(DIGITS.table_bytes + LESS_THAN.words) * pairs,
    )


@lru_cache(256)
def _members(pairs: Pairs, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (
        to_device(torch.from_numpy(each.astype(np.int64)), device, "public")
        for each in (pairs.first, pairs.second)
    )
    return first, second


def _differences_host(words: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    out = torch.empty(len(pairs.first), dtype=torch.int64)
    _subtract(words.long().numpy().reshape(-1), pairs.first, pairs.second, out.numpy())
    return out


def _differences_tensors(words: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    first, second = (words.reshape(-1)[each].long() for each in pairs.on(words.device))
    return first - second


def _one_hot_host(mask: torch.Tensor, words: torch.Tensor, entries: int) -> torch.Tensor:
    out = torch.zeros((*words.shape, entries), dtype=words.dtype)
    _write_one_hot(mask.numpy().reshape(-1), words.numpy(), out.numpy())
    return out


def _one_hot_tensors(mask: torch.Tensor, words: torch.Tensor, entries: int) -> torch.Tensor:
    place = (mask.reshape(-1).long() & (entries - 1))[:, None, None]
    return words[..., None] * (torch.arange(entries, device=words.device) == place)


def _losses_host(mask: torch.Tensor, less: torch.Tensor, pairs: Pairs, won: int) -> torch.Tensor:
    lost = mask.numpy().reshape(-1).copy()
    _count_losses(pairs.first, pairs.second, less.numpy(), won, lost)
    return torch.from_numpy(lost).reshape(mask.shape)


def _losses_tensors(mask: torch.Tensor, less: torch.Tensor, pairs: Pairs, won: int) -> torch.Tensor:
    first, second = pairs.on(mask.device)
    lost = mask.reshape(-1).clone()
    lost.scatter_add_(0, first, less).scatter_add_(0, second, won - less)
    return lost.reshape(mask.shape)


_DIFFERENCES = Kernel("ranks.differences", _differences_host, _differences_tensors, triton=False)
_ONE_HOT = Kernel("ranks.one_hot", _one_hot_host, _one_hot_tensors, triton=False)
_LOSSES = Kernel("ranks.losses", _losses_host, _losses_tensors, triton=False)


@compiled()
def _subtract(words, first, second, out):  # type: ignore[no-untyped-def]
    for pair in range(first.shape[0]):
        out[pair] = words[first[pair]] - words[second[pair]]


@compiled()
def _write_one_hot(mask, payload, out):  # type: ignore[no-untyped-def]
    last = out.shape[2] - 1
    for i in range(payload.shape[0]):
        for k in range(payload.shape[1]):
            out[i, k, mask[i] & last] = payload[i, k]


@compiled()
def _count_losses(first, second, less, won, lost):  # type: ignore[no-untyped-def]
    """Add the lost comparisons to each member. `less` counts for the first member of a pair; the
    second one loses the rest.

    won: this party's share of one.
    """
    for pair in range(first.shape[0]):
        lost[first[pair]] += less[pair]
        lost[second[pair]] += won - less[pair]
