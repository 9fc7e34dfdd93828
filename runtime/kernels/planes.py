"""Streams and point functions by torch alone: AES is the circuit of `bitsliced`.

The reference for the kernels of `correlations` and `protocols` that compute with AES, and the form
for a device without Triton. Every path is walked from its root by itself, with thousands of
launches for each level, so it is slow. As in `cuda.trees`, a node is a seed of two 64-bit words and
a control bit, 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mergec.runtime.kernels import bitsliced, doubles

_HALF_BITS, _WORD_BITS, _LEAF_BITS = 32, 64, 128
_ONES = (1 << _HALF_BITS) - 1
_LOW = 3
"""The two lowest bits of a seed are zero; in a child they are the control bits, left and right."""

_SEED_WORDS = 2

Nodes = tuple[torch.Tensor, torch.Tensor]
"""Seeds, int64 [m, 2], and control bits, int64 [m]."""


class _Words:
    """Words of 32 bits without a sign, in int64, since torch does not shift uint32."""

    def __init__(self, bits: torch.Tensor) -> None:
        self.bits = bits

    def __and__(self, other: Any) -> _Words:
        return _Words(self.bits & _bits(other))

    def __or__(self, other: Any) -> _Words:
        return _Words(self.bits | _bits(other))

    def __xor__(self, other: Any) -> _Words:
        return _Words(self.bits ^ _bits(other))

    def __lshift__(self, count: int) -> _Words:
        return _Words((self.bits << count) & _ONES)

    def __rshift__(self, count: int) -> _Words:
        return _Words(self.bits >> count)


def _bits(value: Any) -> Any:
    return value.bits if isinstance(value, _Words) else value


def encrypt(keys: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """AES of blocks, int64 [n, 2], under planes of round keys, int32 [rounds + 1, 8]."""
    pairs = F.pad(blocks, (0, 0, 0, len(blocks) % 2)).reshape(-1, 2, 2)
    words = [
        _Words((pairs[:, block, half // 2] >> (_HALF_BITS * (half % 2))) & _ONES)
        for half in range(bitsliced.WORD)
        for block in range(2)
    ]
    first, *others = keys.long() & _ONES
    state = [plane ^ key for plane, key in zip(bitsliced.transpose(*words), first, strict=True)]
    for number, round_key in enumerate(others, 1):
        state = [bitsliced.shift_row(plane) for plane in bitsliced.substitute(*state)]
        if number < len(others):
            state = bitsliced.mix_columns(*state)
        state = [plane ^ key for plane, key in zip(state, round_key, strict=True)]
    found = [word.bits for word in bitsliced.transpose(*state)]
    made = [
        found[4 * word + block] | (found[4 * word + 2 + block] << _HALF_BITS)
        for block in range(2)
        for word in range(2)
    ]
    return torch.stack(made, 1).reshape(-1, 2)[: len(blocks)]


def stream(keys: torch.Tensor, start: int, pairs: int) -> torch.Tensor:
    """The key stream of AES-256 in counter mode from block `start` on: uint8 [32 * pairs]."""
    counters = torch.arange(start, start + 2 * pairs, device=keys.device)
    turned = counters.view(torch.uint8).reshape(-1, 8).flip(1).contiguous().view(torch.int64)
    made = encrypt(keys, torch.cat([torch.zeros_like(turned), turned], 1))
    return made.contiguous().view(torch.uint8).reshape(-1)


# ------------------------------------------------------------------------------------------ trees


def _roots(roots: torch.Tensor) -> torch.Tensor:
    return roots & ~_LOW


def _masked(controls: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Words [m, W] where the control bit is set, 0 elsewhere."""
    return words & -controls[:, None]


def _split(child: torch.Tensor, side: int) -> Nodes:
    """A child as seed and control bit. side: 0 of a left one, 1 of a right one."""
    first = child[:, 0]
    return torch.stack([first & ~_LOW, child[:, 1]], 1), (first >> side) & 1


def _children(nodes: Nodes, words: torch.Tensor, ciphers: torch.Tensor) -> tuple[Nodes, Nodes]:
    """Both children. words: the level's correction of each node, [m, 2]."""
    seeds, controls = nodes
    parent = seeds ^ _masked(controls, words)
    left, right = (_split(encrypt(ciphers[side], seeds) ^ parent, side) for side in range(2))
    return left, right


def _chosen(turn: torch.Tensor, right: Nodes, left: Nodes) -> Nodes:
    """The right node where `turn` is 1, else the left one."""
    return torch.where(turn[:, None] == 1, right[0], left[0]), torch.where(
        turn == 1, right[1], left[1]
    )


def _walk(
    roots: torch.Tensor,
    corrections: torch.Tensor,
    key: torch.Tensor,
    ends: torch.Tensor,
    turn: Callable[[int], torch.Tensor],
    party: int,
    ciphers: torch.Tensor,
    depth: int,
) -> Nodes:
    """The nodes at depths `ends` [m] of the trees `key` [m].

    turn: which way each path leaves a level, 1 is right; where a path has ended it may be anything.
    """
    seeds = _roots(roots)[key]
    nodes = seeds, torch.full_like(key, party)
    for level in range(depth):
        words = corrections[key, _SEED_WORDS * level : _SEED_WORDS * (level + 1)]
        left, right = _children(nodes, words, ciphers)
        there = _chosen(turn(level), right, left)
        nodes = _chosen((level < ends).long(), there, nodes)
    return nodes


def _values(nodes: Nodes, ciphers: torch.Tensor, blocks: int) -> torch.Tensor:
    """Values of nodes before their correction, int64 [m, 2 * blocks]."""
    seeds = nodes[0]
    return torch.cat([encrypt(ciphers[2 + block], seeds) ^ seeds for block in range(blocks)], 1)


def _rows(nodes: Nodes, words: torch.Tensor, ciphers: torch.Tensor) -> torch.Tensor:
    """The words of nodes' rows with their corrections `words`, int64 [m, 4]."""
    return _values(nodes, ciphers, words.shape[1] // 2) + _masked(nodes[1], words)


def _factors(position: torch.Tensor, coefficients: torch.Tensor) -> list[torch.Tensor]:
    """What the words of a row count in a cubic's value. coefficients: [..., 4]."""
    c0, c1, c2, c3 = coefficients.unbind(-1)
    a = position
    return [
        c0 + a * (c1 + a * (c2 + a * c3)),
        -(c1 + a * (2 * c2 + 3 * a * c3)),
        c2 + 3 * a * c3,
        -c3,
    ]


def _signed(total: torch.Tensor, party: int) -> torch.Tensor:
    return -total if party else total


def table_values(
    points: torch.Tensor,
    roots: torch.Tensor,
    corrections: torch.Tensor,
    table: Any,
    party: int,
    generator: Any,
) -> torch.Tensor:
    """A party's shares of the values of an `interval.Table` at public points [n]."""
    device, windows = points.device, table.windows
    depth, ciphers = windows.bit_length() - 1, generator.planes(device)
    place = torch.arange(len(points) * windows, device=device)
    key, leaf = place // windows, place % windows
    nodes = _walk(
        roots, corrections, key, torch.full_like(key, depth),
        lambda level: (leaf >> (depth - 1 - level)) & 1, party, ciphers, depth,
    )  # fmt: skip
    rows = _rows(nodes, corrections[key, _SEED_WORDS * depth :], ciphers)
    z = points[key]
    window = ((z >> table.step_bits) - leaf) & (windows - 1)
    position = (z & ((1 << table.step_bits) - 1)) >> table.drop
    factors = torch.stack(_factors(position, table.factors(device)[window]), 1)
    return _signed((rows * factors).sum(1).reshape(len(points), windows).sum(1), party)


def octave_values(
    points: torch.Tensor,
    roots: torch.Tensor,
    corrections: torch.Tensor,
    descent: Any,
    party: int,
    generator: Any,
    out: torch.Tensor,
) -> None:
    """Add a party's shares of an `octave.Descent` at points [n] to out [n, columns, width]."""
    device, ciphers = points.device, generator.planes(points.device)
    lower = descent.nodes(device)
    upper = lower.clone()
    upper[:, 1] += 1
    lines = torch.cat([lower, upper])
    place = torch.arange(len(points) * len(lines), device=device)
    key = place // len(lines)
    end, window, bound, column, drop, table, correction, _ = lines[place % len(lines)].unbind(1)
    z = points[key]
    shifted = z >> (descent.top - end)
    row = (shifted - window) & ((torch.ones_like(end) << end) - 1)
    nodes = _walk(
        roots, corrections, key, end, lambda level: (row >> (end - 1 - level).clamp(min=0)) & 1,
        party, ciphers, descent.depth,
    )  # fmt: skip
    used = window <= bound + (shifted & 1)
    coefficients = descent.factors(device).reshape(-1, 4)[torch.where(used, table // 4 + window, 0)]
    # The sign, of which a shift makes copies, is above what counts.
    moved = (z << (-drop).clamp(min=0)) >> drop.clamp(min=0)
    position = moved & ((1 << descent.step_bits) - 1)
    factors = [factor * used for factor in _factors(position, coefficients)]
    number = torch.arange(descent.row_words, device=device)
    words = corrections[key[:, None], correction[:, None] + number]
    values, more = _values(nodes, ciphers, descent.blocks), _masked(nodes[1], words)
    target, size = key * out.shape[1] + column, out.shape[0] * out.shape[1]
    if descent.width == 1:
        found = ((values + more) * torch.stack(factors, 1)).sum(1)
        sums = found.new_zeros(size).index_add_(0, target, _signed(found, party))
        out += sums.reshape(out.shape)
        return
    total: doubles.Double = (torch.zeros_like(z), torch.zeros_like(z))
    for k, factor in enumerate(factors):
        one, other = ((each[:, 2 * k], each[:, 2 * k + 1]) for each in (values, more))
        total = doubles.plus(total, doubles.times(doubles.plus(one, other), factor))
    if party:
        total = doubles.minus((torch.zeros_like(z), torch.zeros_like(z)), total)
    # Halves of the lower word are added up apart, so that no carry is lost.
    low, high = total
    parts = torch.stack([low & _ONES, (low >> _HALF_BITS) & _ONES, high], 1)
    first, second, last = parts.new_zeros((size, 3)).index_add_(0, target, parts).unbind(1)
    second = second + (first >> _HALF_BITS)
    added = (first & _ONES) | (second << _HALF_BITS), last + (second >> _HALF_BITS)
    old = out.reshape(-1, 2)
    out.copy_(torch.stack(doubles.plus((old[:, 0], old[:, 1]), added), 1).reshape(out.shape))


def long_values(
    opened: torch.Tensor,
    roots: torch.Tensor,
    corrections: torch.Tensor,
    spec: Any,
    party: int,
    generator: Any,
) -> torch.Tensor:
    """A party's shares of logarithms of a `LongLog` at opened numbers, int32 halves [n, H]."""
    device, ciphers = opened.device, generator.planes(opened.device)
    bits = ((opened.long()[..., None] >> torch.arange(_HALF_BITS, device=device)) & 1).flatten(1)
    # The highest table begins with the window `first` and has one more than `end`; the lowest has
    # those below `first` too; all others end with the children of 15.
    places = torch.arange(spec.tables * (spec.end + 1), device=device)
    tables, windows = places // (spec.end + 1), places % (spec.end + 1)
    kept = (tables == 0) | (windows >= spec.first)
    tables, windows = tables[kept], windows[kept]
    place = torch.arange(len(opened) * len(tables), device=device)
    key, table, window = (
        place // len(tables),
        tables[place % len(tables)],
        windows[place % len(tables)],
    )
    lowest = spec.base + spec.per_table * table
    end = spec.depth - spec.per_table * table
    turns = _less_windows(bits[:, spec.base :], spec, key, table, window)
    nodes = _walk(
        roots, corrections, key, end,
        lambda level: turns.gather(1, (end - 1 - level).clamp(min=0)[:, None])[:, 0],
        party, ciphers, spec.depth,
    )  # fmt: skip
    low = _number(bits, key, lowest, spec.per_table)
    children = (spec.first - 1) * (1 << spec.per_table) + low
    used = window <= torch.where(table == spec.tables - 1, spec.end, children)
    first = _SEED_WORDS * spec.depth + 4 * table
    words = corrections[key[:, None], first[:, None] + torch.arange(4, device=device)]
    rows = _rows(nodes, words, ciphers)
    position = _number(bits, key, lowest - spec.step_bits, spec.step_bits)
    factors = torch.stack(_factors(position, spec.factors(device)[window]), 1)
    value = (rows * factors).sum(1) + rows[:, 0] * spec.starts(device)[table]
    return _signed((value * used).reshape(len(opened), len(tables)).sum(1), party)


def _number(bits: torch.Tensor, key: torch.Tensor, place: torch.Tensor, count: int) -> torch.Tensor:
    """`count` bits of the key's number from `place` on; zeros beyond its end."""
    each = torch.arange(count, device=bits.device)
    padded = F.pad(bits, (0, count))
    at = (place[:, None] + each).clamp(max=padded.shape[1] - 1)
    return (padded[key[:, None], at] << each).sum(1)


def _less_windows(
    bits: torch.Tensor, spec: Any, key: torch.Tensor, table: torch.Tensor, window: torch.Tensor
) -> torch.Tensor:
    """The bits of each table's number minus the window, the lowest first: int64 [m, depth]."""
    first, each = spec.per_table * table, torch.arange(spec.depth, device=bits.device)
    padded = F.pad(bits, (0, spec.depth))
    own = padded[key[:, None], first[:, None] + each]
    found, borrow = [], torch.zeros_like(window)
    for place, bit in enumerate(own.unbind(1)):
        less = (window >> min(place, _WORD_BITS - 2)) & 1
        left = bit - less - borrow
        found.append(left & 1)
        borrow = (left < 0).long()
    return torch.stack(found, 1)


def parities(
    roots: torch.Tensor,
    corrections: torch.Tensor,
    places: torch.Tensor,
    depth: int,
    party: int,
    generator: Any,
) -> torch.Tensor:
    """XOR shares of [index < place]: uint8 [n, P] for places [n, P] (`dpf.parities`)."""
    ciphers, flat = generator.planes(places.device), places.reshape(-1)
    key = torch.arange(len(flat), device=places.device) // max(1, places.shape[1])
    nodes: Nodes = _roots(roots)[key], torch.full_like(flat, party)
    found = torch.zeros_like(flat)
    for level in range(depth):
        words = corrections[key, _SEED_WORDS * level : _SEED_WORDS * (level + 1)]
        left, right = _children(nodes, words, ciphers)
        turn = (flat >> (depth + 6 - level)) & 1
        # Where a path turns right, the left child's control bit counts as well.
        found = found ^ (turn & left[1])
        nodes = _chosen(turn, right, left)
    leaf = _values(nodes, ciphers, 1) ^ _masked(nodes[1], corrections[key, _SEED_WORDS * depth :])
    bit = torch.arange(_LEAF_BITS, device=places.device)
    held = (leaf[:, bit // _WORD_BITS] >> (bit % _WORD_BITS)) & 1
    before = (held * (bit < (flat & (_LEAF_BITS - 1))[:, None])).sum(1)
    return ((found + before) & 1).to(torch.uint8).reshape(places.shape)


def tally(
    roots: torch.Tensor,
    corrections: torch.Tensor,
    first: torch.Tensor,
    rows: torch.Tensor,
    job: Any,
    count: int,
    party: int,
    generator: Any,
) -> torch.Tensor:
    """The counters of a `counters.Tally`, added up: [count, padded], of the counters' type."""
    device, depth, bits = first.device, job.counters.depth, job.counters.bits
    nodes, offsets = job.paths(first)
    place = torch.arange(nodes.numel() << job.cut, device=device)
    path, below = place >> job.cut, place & ((1 << job.cut) - 1)
    key, leaf = path // nodes.shape[1], (nodes.reshape(-1)[path] << job.cut) | below
    ciphers = generator.planes(device)
    reached = _walk(
        roots, corrections, key, torch.full_like(key, depth),
        lambda level: (leaf >> (depth - 1 - level)) & 1, party, ciphers, depth,
    )  # fmt: skip
    last = _masked(reached[1], corrections[key, _SEED_WORDS * depth :])
    counters = _numbers(_values(reached, ciphers, 1), bits) + _numbers(last, bits)
    each = torch.arange(counters.shape[1], device=device)
    start = offsets.reshape(-1)[path] + below * counters.shape[1] + job.padded * rows[key]
    total = torch.zeros(count * job.padded, dtype=torch.int64, device=device)
    total.index_add_(0, (start[:, None] + each).reshape(-1), counters.reshape(-1))
    return total.reshape(count, job.padded).to(job.counters.kind)


def _numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of `bits` bits, below 64, in words [m, W]: int64 [m, W * 64 / bits]."""
    shifts = torch.arange(0, _WORD_BITS, bits, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


# ------------------------------------------------------------------------------- the dealer's part


def corrections(
    client: torch.Tensor,
    server: torch.Tensor,
    index: torch.Tensor,
    payloads: torch.Tensor,
    ends: Sequence[int],
    depth: int,
    generator: Any,
    bits: int,
) -> torch.Tensor:
    """The dealer's correction words: int64 [n, 2 * depth + K * W] (`dpf.correct`)."""
    ciphers = generator.planes(index.device)
    places = index if index.dim() > 1 else index[:, None]
    seeds = [_roots(client), _roots(server)]
    flag = torch.ones_like(places[:, 0])
    words, last = [], [torch.empty(0)] * len(ends)
    for level in range(depth + 1):
        for k, end in enumerate(ends):
            if end == level:
                one, other = (
                    _values((seed, flag), ciphers, payloads.shape[2] // 2) for seed in seeds
                )
                last[k] = _last(payloads[k], one, other, flag, bits)
        if level == depth:
            break
        word, place = divmod(depth - 1 - level, _WORD_BITS)
        turn = (places[:, word] >> place) & 1
        children = [[encrypt(ciphers[side], seed) ^ seed for side in range(2)] for seed in seeds]
        left, right = (children[0][side] ^ children[1][side] for side in range(2))
        # The child off the path must become equal at both parties, its control bit too; those of
        # the child on the path must differ.
        lost = torch.where(turn[:, None] == 1, left, right)
        controls = ((left[:, 0] ^ turn ^ 1) & 1) | ((right[:, 0] ^ (turn << 1)) & 2)
        words.append(torch.stack([(lost[:, 0] & ~_LOW) | controls, lost[:, 1]], 1))
        kept = [
            torch.where(turn[:, None] == 1, child[1], child[0]) ^ _masked(own, words[-1])
            for child, own in zip(children, (1 - flag, flag), strict=True)
        ]
        flag = (kept[1][:, 0] >> turn) & 1
        seeds = [torch.stack([each[:, 0] & ~_LOW, each[:, 1]], 1) for each in kept]
    return torch.cat([*words, *last], 1)


def _last(
    payload: torch.Tensor, one: torch.Tensor, other: torch.Tensor, flag: torch.Tensor, bits: int
) -> torch.Tensor:
    """What turns the client's values `one` and the server's into the payload, int64 [n, W].

    Number by number of `bits` bits, negative where the server adds it; by XOR if `bits` is 0.
    """
    if not bits:
        return payload ^ one ^ other
    sign = 1 - 2 * flag[:, None]
    if bits == _WORD_BITS:
        return (payload - one + other) * sign
    if bits < _WORD_BITS:
        number = (_numbers(payload, bits) - _numbers(one, bits) + _numbers(other, bits)) * sign
        shifts = torch.arange(0, _WORD_BITS, bits, device=payload.device)
        parts = (number & ((1 << bits) - 1)).reshape(*payload.shape, len(shifts))
        return (parts << shifts).sum(-1)
    wanted, mine, theirs = ((each[:, ::2], each[:, 1::2]) for each in (payload, one, other))
    total = doubles.times(doubles.plus(doubles.minus(wanted, mine), theirs), sign)
    return torch.stack(total, 2).flatten(1)
