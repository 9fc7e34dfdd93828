"""The maximum of each row to within two units, by comparing all pairs of a group at once.

A softmax does not change when all its scores are shifted, as long as nothing overflows. So only the
integer part of the maximum is needed. The integer parts x_i of a group's members are opened under
masks, z_i = x_i + r_i modulo 2**16. For each pair the dealer shares the digit tables of r_i - r_j,
so [x_i < x_j] follows from z_i - z_j (`digits`, `formula`). The number of comparisons that a member
loses is its rank, and exactly one member has rank zero. The ranks are opened under masks rho modulo
256, and looked up in shared one-hot rows of rho and in the same rows times r_i. So [rank_i = 0]
x_i, and the sum over i, are public linear combinations of dealt words. Three rounds reduce a group
of up to 16 to one value, and two levels reduce a row of 256.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.digits import Digits
from mergec.runtime.protocols.formula import Formula, open_bits
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.ranks import Pairs

GROUP = 16
"""Default of the most members of a group, which are all compared with each other."""

_DIGITS = Digits(6, 5, 5)
_LESS = Formula(_DIGITS.less)
_INTEGER_DROP = 16

_REMEMBERED = 1 << 22
"""Masks up to this many entries stay cached for the next layer: 591 tokens of 12 heads, 131 MB."""


_KEPT = 6
"""Two steps of up to three sets of rows: all, and the short and the long ones (`histogram`)."""


@dataclass(frozen=True, eq=False)
class _Level:
    """Which of the values are compared.

    members: indices of the values in a group of at least two. pairs: pairs of these. group: the
    group of each value. groups: number of groups.
    """

    members: np.ndarray
    pairs: Pairs
    group: np.ndarray
    groups: int

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`members` and `group` on a device."""
        return _indices(self, device)


@dataclass(frozen=True, eq=False)
class Entries:
    """The valid entries of rows, and how they are compared.

    places: their flat indices among all entries, int64 [entries]. rows: the row of each. firsts:
    where each row's first one is among them. counts: their number in each row, on the CPU.
    """

    places: torch.Tensor
    rows: torch.Tensor
    firsts: torch.Tensor
    counts: torch.Tensor

    def levels(self, group: int) -> Sequence[_Level]:
        """How `peak` compares them in groups of at most that many, level by level."""
        return _levels(self, group)

    def on(self, device: torch.device) -> Entries:
        """The same with its indices on a device."""
        return _moved(self, device)


def entries_of(valid: torch.Tensor) -> Entries:
    """The valid entries of rows, from public bool [R, L] with at least one True per row."""
    if valid.numel() > _REMEMBERED:
        return _find_entries(valid)
    return _remembered(valid.numpy().tobytes(), valid.shape)


@lru_cache(maxsize=_KEPT)
def _remembered(valid: bytes, shape: Sequence[int]) -> Entries:
    """All layers of a step share the same entries; those of the last two steps are cached."""
    return _find_entries(torch.frombuffer(bytearray(valid), dtype=torch.bool).reshape(shape))


def _find_entries(valid: torch.Tensor) -> Entries:
    rows, columns = valid.nonzero(as_tuple=True)
    counts = valid.sum(1)
    return Entries(rows * valid.shape[1] + columns, rows, counts.cumsum(0) - counts, counts)


@lru_cache(maxsize=_KEPT)
def _moved(entries: Entries, device: torch.device) -> Entries:
    places, rows, firsts = (
        to_device(each, device, "public") for each in (entries.places, entries.rows, entries.firsts)
    )
    if places is entries.places:
        return entries
    return Entries(places, rows, firsts, entries.counts)


@lru_cache(maxsize=_KEPT)
def _levels(entries: Entries, group: int) -> Sequence[_Level]:
    return tuple(_plan(entries.counts, group))


def _plan(counts: torch.Tensor, group: int) -> Iterator[_Level]:
    longest = int(counts.max())
    levels = 0
    while group**levels < longest:
        levels += 1
    for left in range(levels, 0, -1):
        # The smallest groups whose winners fit into the remaining levels.
        size = max(2, -(-longest // group ** (left - 1)))
        groups = -(-counts // size)
        row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        own = (groups.cumsum(0) - groups)[row] + place // size
        table = torch.full((int(groups.sum()), size), -1)
        table[own, place % size] = torch.arange(len(row))
        contested = table[:, 1] >= 0
        members = table[contested]
        members = members[members >= 0].sort().values
        position = torch.full((len(row),), -1)
        position[members] = torch.arange(len(members))
        i, j = torch.triu_indices(size, size, 1)
        exists = table[:, j] >= 0
        first, second = (position[table[:, k][exists]].numpy().astype(np.int32) for k in (i, j))
        yield _Level(
            members.numpy(),
            # The one-hot row has a power of two of entries, more than any rank.
            Pairs(first, second, len(members), 1 << (size - 1).bit_length()),
            own.numpy(),
            len(table),
        )
        counts, longest = groups, -(-longest // size)


def peak(ctx: Context, share: torch.Tensor, valid: torch.Tensor, group: int = GROUP) -> Protocol:
    """Shares modulo 2**32 of a multiple of 2**16 in (m - 2 * 2**16, m] for each row's maximum m.

    In: int32 share [R, L] with 16 fractional bits whose differences are in [-2**15, 2**15) units;
    `valid`, public bool [R, L] with at least one True per row. Other entries are ignored. group:
    how many are compared with each other at most, up to 128. Out: [R]. Rounds 3 per level; a row of
    group**n entries takes n levels. Online 6 bytes for each member of a group and 2 for each pair;
    offline 44 bytes per pair and, per member, 4 for each member that a group may have, rounded up
    to a power of two. Each party sees integer parts, bits and ranks, each under fresh, uniform
    masks.
    """
    entries = entries_of(valid)
    values = integer_parts(share, entries)
    for level in entries.levels(group):
        values = yield from _winners(ctx, values, level)
    return from_integers(values)


def integer_parts(share: torch.Tensor, entries: Entries) -> torch.Tensor:
    """Shares modulo 2**16 of the integer parts of valid entries [entries], or of one less.

    In: int32 share [R, L] with 16 fractional bits. Local.
    """
    if share.is_meta:
        return ghost((len(entries.places),), dtype=torch.int16)
    # For x = a + b, the integer parts of a and b add up to that of x, or to one less.
    values = share.reshape(-1)[entries.on(share.device).places]
    return (values >> _INTEGER_DROP).to(torch.int16)


def from_integers(values: torch.Tensor) -> torch.Tensor:
    """Shares modulo 2**32, with 16 fractional bits, of integers shared modulo 2**16."""
    return values.to(torch.int32) if values.is_meta else values.to(torch.int32) << _INTEGER_DROP


def peak_cost(valid: torch.Tensor, group: int = GROUP) -> Cost:
    """Cost of `peak` for rows with these valid entries."""
    total = Cost()
    for level in entries_of(valid).levels(group):
        members, pairs = len(level.members), len(level.pairs.first)
        total += Cost(
            rounds=3,
            online=6 * members + 2 * pairs,
            offline=(_DIGITS.table_bytes + _LESS.words) * pairs + 4 * level.pairs.entries * members,
        )
    return total


def _winners(ctx: Context, values: torch.Tensor, level: _Level) -> Protocol:
    """The largest value of each group: int16 shares [groups]."""
    pairs, count = level.pairs, len(level.members)
    mask = ctx.mask((count,), torch.int16)
    tables = ctx.deal_bits(
        (len(pairs.first), _DIGITS.table_bytes), lambda: _DIGITS.tables(pairs.differences(mask))
    )
    bit_mask = ctx.mask_bits((len(pairs.first),))
    words = _LESS.deal(ctx, bit_mask, dtype=torch.int8)
    rank_mask = ctx.mask((count,), torch.int8)
    rows = ctx.deal((count, 2, pairs.entries), lambda: pairs.one_hot(rank_mask, mask), torch.int16)
    if values.is_meta:
        # Meta tensors only determine the shapes of messages.
        yield from open_under(ctx, rows[:, 0, 0], mask)
        yield from open_bits(ctx, tables[:, 0], bit_mask)
        yield from pairs.open_ranks(ctx, words, rank_mask)
        return ghost((level.groups,), dtype=torch.int16)
    members, _ = level.on(values.device)
    opened = yield from open_under(ctx, values[members], mask)
    found = _DIGITS.look_up(pairs.differences(opened), tables)
    bits = yield from open_bits(ctx, found, bit_mask)
    less = _LESS.evaluate(bits, words)[:, 0]
    rank = yield from pairs.open_ranks(ctx, less, rank_mask)
    winners: torch.Tensor = _WINNERS(values, opened, rank, rows, level)
    return winners


@lru_cache(2 * _KEPT)
def _indices(level: _Level, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    members, group = (
        to_device(torch.from_numpy(each), device, "public") for each in (level.members, level.group)
    )
    return members, group


def _winners_host(
    values: torch.Tensor,
    opened: torch.Tensor,
    rank: torch.Tensor,
    rows: torch.Tensor,
    level: _Level,
) -> torch.Tensor:
    winners = torch.zeros(level.groups, dtype=torch.int16)
    _add_winners(
        opened.numpy(), rank.numpy(), rows.numpy(), level.members, values.numpy(), level.group,
        winners.numpy(),
    )  # fmt: skip
    return winners


def _winners_tensors(
    values: torch.Tensor,
    opened: torch.Tensor,
    rank: torch.Tensor,
    rows: torch.Tensor,
    level: _Level,
) -> torch.Tensor:
    members, group = level.on(values.device)
    place = (rank.long() & (level.pairs.entries - 1))[:, None, None].expand(-1, 2, 1)
    chosen = rows.gather(2, place)[..., 0]
    left = values.clone()
    left[members] = opened * chosen[:, 0] - chosen[:, 1]
    winners = torch.zeros(level.groups, dtype=torch.int16, device=values.device)
    return winners.scatter_add_(0, group, left)


_WINNERS = Kernel("peak.winners", _winners_host, _winners_tensors, triton=False)


@compiled()
def _add_winners(  # type: ignore[no-untyped-def]
    opened, rank, rows, members, values, group, winners
):
    """Sum each group: members that lost count as zero; a value without a rival counts as it is."""
    last, next_member = rows.shape[2] - 1, 0
    for i in range(values.shape[0]):
        value = values[i]
        if next_member < members.shape[0] and members[next_member] == i:
            place = rank[next_member] & last
            value = opened[next_member] * rows[next_member, 0, place]
            value -= rows[next_member, 1, place]
            next_member += 1
        winners[group[i]] += value
