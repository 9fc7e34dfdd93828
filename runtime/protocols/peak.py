"""The maximum of each row to within two units, by comparing all pairs of a group at once.

A softmax does not depend on what its scores are shifted by, as long as nothing overflows; so it
needs no more of the maximum than the integer part. The integer parts x_i of a group's members are
opened under masks, z_i = x_i + r_i modulo 2**16. For each pair the dealer has shared the digit
tables of r_i - r_j, so that [x_i < x_j] follows from z_i - z_j (`digits`, `formula`). The sum of
the comparisons that a member loses is its rank, and exactly one member has rank zero. The ranks are
opened under masks rho modulo 256, and looked up in shared one-hot rows of rho, and in
the same times r_i: so [rank_i = 0] x_i, and their sum, are public combinations of dealt words.
Three rounds take a group of up to 16 to one, and two levels a row of 256.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from runtime.context import Context
from runtime.messages import Protocol, Swap
from runtime.protocols.digits import Digits
from runtime.protocols.formula import Formula, open_bits
from runtime.protocols.opening import open_under
from runtime.spec import CLIENT, Cost

GROUP = 16
"""Largest group that is compared pair by pair."""

_DIGITS = Digits(6, 5, 5)
_LESS = Formula(_DIGITS.less)
_INTEGER_DROP = 16

_REMEMBERED = 1 << 16
"""Entries of rows whose comparisons are kept: those of a decode step are, those of a prompt not."""


@dataclass
class _Level:
    """Which of the values are compared.

    members: values that are in a group of at least two. group: of each value, its number.
    first, second: each pair, as positions in `members`. size: members of the largest group.
    """

    members: torch.Tensor
    group: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    size: int

    @property
    def entries(self) -> int:
        """Length of a one-hot row: a power of two that no rank reaches."""
        return 1 << (self.size - 1).bit_length()

    def to(self, device: torch.device) -> _Level:
        return _Level(
            self.members.to(device),
            self.group.to(device),
            self.first.to(device),
            self.second.to(device),
            self.size,
        )


def _levels(valid: torch.Tensor) -> Sequence[_Level]:
    """The comparisons of rows with these valid entries, level by level."""
    if valid.numel() > _REMEMBERED:
        return tuple(_plan(valid))
    return _remembered(valid.numpy().tobytes(), valid.shape)


@lru_cache(maxsize=2)
def _remembered(valid: bytes, shape: Sequence[int]) -> Sequence[_Level]:
    """The layers of a step have all the same: that of the last two steps is kept."""
    return tuple(_plan(torch.frombuffer(bytearray(valid), dtype=torch.bool).reshape(shape)))


def _plan(valid: torch.Tensor) -> Iterator[_Level]:
    counts = valid.sum(1)
    longest = int(counts.max())
    levels = 0
    while GROUP**levels < longest:
        levels += 1
    for left in range(levels, 0, -1):
        # The smallest groups whose winners the levels after this one can do with.
        size = max(2, -(-longest // GROUP ** (left - 1)))
        groups = -(-counts // size)
        row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        group = (groups.cumsum(0) - groups)[row] + place // size
        table = torch.full((int(groups.sum()), size), -1)
        table[group, place % size] = torch.arange(len(row))
        contested = table[:, 1] >= 0
        members = table[contested]
        members = members[members >= 0].sort().values
        position = torch.full((len(row),), -1)
        position[members] = torch.arange(len(members))
        i, j = torch.triu_indices(size, size, 1)
        exists = table[:, j] >= 0
        yield _Level(
            members, group, position[table[:, i][exists]], position[table[:, j][exists]], size
        )
        counts, longest = groups, -(-longest // size)


def peak(ctx: Context, share: torch.Tensor, valid: torch.Tensor) -> Protocol:
    """Shares modulo 2**32 of a multiple of 2**16 in (m - 2 * 2**16, m] for each row's maximum m.

    In: int32 share [R, L] of 16 fractional bits with differences inside [-2**15, 2**15) units;
    `valid`, public bool [R, L] with an entry in each row: the other entries are left out. Out: [R].
    Rounds 3 for each level, of which a row of 16**n entries takes n; online 6 bytes for each member
    of a group and 2 for each pair; offline 44 bytes a pair and up to 64 a member. Each party
    sees integer parts, bits and ranks under fresh masks.
    """
    if share.is_meta:
        values = torch.empty(int(valid.sum()), dtype=torch.int16, device="meta")
    else:
        # Of x = a + b the integer parts of a and b give that of x, or one less.
        values = ((share >> _INTEGER_DROP).to(torch.int16))[valid.to(share.device)]
    for level in _levels(valid):
        values = yield from _winners(ctx, values, level)
    return values.to(torch.int32) if values.is_meta else values.to(torch.int32) << _INTEGER_DROP


def peak_cost(valid: torch.Tensor) -> Cost:
    """Cost of `peak` for rows with these valid entries."""
    total = Cost()
    for level in _levels(valid):
        members, pairs = len(level.members), len(level.first)
        total += Cost(
            rounds=3,
            online=6 * members + 2 * pairs,
            offline=(_DIGITS.table_bytes + _LESS.words) * pairs + 4 * level.entries * members,
        )
    return total


def _winners(ctx: Context, values: torch.Tensor, level: _Level) -> Protocol:
    """The largest value of each group, int16 shares [groups]."""
    if not values.is_meta:
        level = level.to(values.device)
    pairs, count = len(level.first), len(level.members)
    mine = torch.empty(count, dtype=torch.int16, device="meta")
    mine = mine if values.is_meta else values[level.members]
    mask = ctx.mask((count,), torch.int16)

    def difference(words: torch.Tensor) -> torch.Tensor:
        first, second = level.first.to(words.device), level.second.to(words.device)
        return words.long()[first] - words.long()[second]

    tables = ctx.deal_bits((pairs, _DIGITS.table_bytes), lambda: _DIGITS.tables(difference(mask)))
    bit_mask = ctx.mask_bits((pairs,))
    words = _LESS.deal(ctx, bit_mask, dtype=torch.int8)
    rank_mask = ctx.mask((count,), torch.int8)
    entries = level.entries

    def one_hot() -> torch.Tensor:
        rows = torch.zeros((count, 2, entries), dtype=torch.int16, device=mask.device)
        place = (rank_mask.long() & (entries - 1))[:, None, None].expand(count, 2, 1)
        payload = torch.stack([torch.ones_like(mask), mask], 1)[:, :, None]
        return rows.scatter_(2, place, payload)

    rows = ctx.deal((count, 2, entries), one_hot, torch.int16)
    opened = yield from open_under(ctx, mine, mask)
    points = tables if values.is_meta else difference(opened)
    found = torch.empty(pairs, dtype=torch.uint8, device="meta")
    found = found if values.is_meta else _DIGITS.look_up(points, tables)
    bits = yield from open_bits(ctx, found, bit_mask)
    less = _LESS.evaluate(bits, words)[:, 0]
    rank = yield from _open_ranks(ctx, less, rank_mask, level)
    groups = int(level.group[-1]) + 1
    if values.is_meta:
        return torch.empty(groups, dtype=torch.int16, device="meta")
    place = rank[:, None, None].expand(count, 2, 1)
    chosen, masked = rows.gather(2, place)[:, :, 0].long().unbind(1)
    # Values that nobody contests are their groups'; members that lost count as nothing.
    kept = values.long().clone()
    kept[level.members] = opened.long() * chosen - masked
    winners = torch.zeros(groups, dtype=torch.int64, device=values.device)
    return winners.index_add_(0, level.group, kept).to(torch.int16)


def _open_ranks(ctx: Context, less: torch.Tensor, mask: torch.Tensor, level: _Level) -> Protocol:
    """How many comparisons each member lost, plus its mask, modulo `entries`: int64 [members].

    What is opened is uniform modulo 256, as the mask is.
    """
    ctx.spend(mask)
    if less.is_meta:
        yield Swap(torch.empty(len(level.members), dtype=torch.int8, device="meta"))
        return less
    lost = mask.long()
    lost.index_add_(0, level.first, less.long())
    won = -less.long()
    if ctx.party == CLIENT:
        won = won + 1
    lost.index_add_(0, level.second, won)
    mine = lost.to(torch.int8)
    other = yield Swap(mine)
    return (mine + other).long() & (level.entries - 1)
