"""Logarithms of long numbers (`protocols.logarithm`): a stem first, then all tables at once.

A tree has hundreds of levels, and each waits for the one before it. But windows far down descend
from very few nodes: a child's window is twice its parent's, or one more or less. So the windows up
to 2**8 of any level descend from windows 0 and 1 of 8 levels above, and these from windows 0 and 1
again. One thread for each key walks down with these two nodes, the *stem*, and writes them where a
table needs them. Then all windows of all tables start there at once, two in each thread. For two
windows that takes ten encryptions of two blocks, where a walk that keeps all nodes of a level takes
four. But what is done level by level is one encryption of two blocks, and no thread needs what
another one holds.

Which nodes are read, and which way a path turns, follows from the opened number, which is public.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch, threads
from mergec.runtime.kernels.cuda.trees import (
    chosen,
    cubic,
    high_half,
    joined,
    low_half,
    mask_of,
    root_of,
    rows_of,
    step,
)


@triton.jit
def _bits(points, key, place, number, halves, inside):  # type: ignore[no-untyped-def]
    """Up to 31 bits of the key's opened number from `place` on; zeros beyond its end."""
    half = key * 0 + place // 32
    at = points + halves * key + half
    low = tl.load(at, mask=inside & (half < halves), other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(at + 1, mask=inside & (half + 1 < halves), other=0).to(tl.int64)
    return ((low | (high << 32)) >> (place % 32)) & (((half * 0 + 1) << number) - 1)


@triton.jit
def _write(stem, place, s0, s1, s2, s3, flag, inside):  # type: ignore[no-untyped-def]
    """A node as two words. A seed's lowest bit is zero, and stands for the control bit."""
    tl.store(stem + 2 * place, joined(s0 | (flag & 1), s1), mask=inside)
    tl.store(stem + 2 * place + 1, joined(s2, s3), mask=inside)


@triton.jit
def _read(stem, place, inside):  # type: ignore[no-untyped-def]
    first = tl.load(stem + 2 * place, mask=inside, other=0)
    second = tl.load(stem + 2 * place + 1, mask=inside, other=0)
    seed = low_half(first) & 0xFFFFFFFC
    return seed, high_half(first), low_half(second), high_half(second), mask_of(low_half(first))


@kernel
def _stem(  # type: ignore[no-untyped-def]
    points, roots, corrections, ciphers, stem, count, halves, words, tables, depth, base, party,
    OCTAVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    key = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = key < count
    # Node a has window 0, which is z's own row, and node b window 1, the row before it.
    a0, a1, a2, a3 = root_of(roots, key, inside)
    b0, b1, b2, b3 = a0, a1, a2, a3
    fa = mask_of(key * 0 + party)
    fb = fa
    for level in range(OCTAVES * (tables - 1) + 1):
        turn = mask_of(_bits(points, key, base + depth - 1 - level, 1, halves, inside))
        # If z turns right, the row before the new one is this node's left child.
        b0, b1 = chosen(turn, a0, b0), chosen(turn, a1, b1)
        b2, b3 = chosen(turn, a2, b2), chosen(turn, a3, b3)
        fb = chosen(turn, fa, fb)
        at = words * key + 2 * level
        a0, a1, a2, a3, fa, b0, b1, b2, b3, fb = step(
            a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, turn, turn ^ 0xFFFFFFFF, ciphers, corrections,
            at, at, inside, inside,
        )  # fmt: skip
        if level % OCTAVES == 0:
            place = 2 * (tables * key + level // OCTAVES)
            _write(stem, place, a0, a1, a2, a3, fa, inside)
            _write(stem, place + 1, b0, b1, b2, b3, fb, inside)


@kernel
def _tables(  # type: ignore[no-untyped-def]
    points, stem, corrections, coefficients, offsets, ciphers, out, count, halves, words, tables,
    lines, levels, depth, base, step_bits, party, FIRST: tl.constexpr, END: tl.constexpr,
    OCTAVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Thread (key, line) has two windows of a table. The highest table comes first. The lowest one
    # comes last, with the lines of its windows below FIRST, which others do not have.
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    key, line = place // lines, place % lines
    each = (END - FIRST) // 2 + 1
    number = tl.minimum(line // each, tables - 1)
    table = tables - 1 - number
    window = 2 * (line - each * number) + tl.where(table > 0, FIRST, 0)
    lowest = base + OCTAVES * table
    z = _bits(points, key, lowest, levels, halves, inside)
    # Windows end at END in the highest table; in others at the last child of the kept nodes.
    last = tl.where(number > 0, (FIRST - 1) * (1 << OCTAVES) + (z & ((1 << OCTAVES) - 1)), END)
    first, second = z - window, z - window - 1
    at = 2 * (tables * key + number)
    a0, a1, a2, a3, fa = _read(stem, at + (first < 0).to(tl.int64), inside)
    b0, b1, b2, b3, fb = _read(stem, at + (second < 0).to(tl.int64), inside)
    for level in range(levels):
        at = words * key + 2 * (OCTAVES * number + 1 + level)
        below = levels - 1 - level
        a0, a1, a2, a3, fa, b0, b1, b2, b3, fb = step(
            a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, mask_of(first >> below),
            mask_of(second >> below), ciphers, corrections, at, at, inside, inside,
        )  # fmt: skip
    row = corrections + words * key + 2 * depth + 4 * table
    p0, p1, p2, p3, r0, r1, r2, r3 = rows_of(
        a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, ciphers, row, inside
    )
    position = _bits(points, key, lowest - step_bits, step_bits, halves, inside)
    offset = tl.load(offsets + table, mask=inside, other=0)
    used, again = inside & (window <= last), inside & (window + 1 <= last)
    total = cubic(p0, p1, p2, p3, position, coefficients, window, used)
    total += cubic(r0, r1, r2, r3, position, coefficients, window + 1, again)
    total += tl.where(used, p0 * offset, 0) + tl.where(again, r0 * offset, 0)
    tl.store(out + place, tl.where(party == 1, -total, total), mask=inside)


def values(
    opened: torch.Tensor,
    roots: torch.Tensor,
    corrections: torch.Tensor,
    spec: Any,
    party: int,
    generator: Any,
) -> torch.Tensor:
    """A party's shares of logarithms of a `LongLog` at opened numbers, int32 halves [n, H]."""
    (count, halves), device, tables = opened.shape, opened.device, spec.tables
    lines = tables * ((spec.end - spec.first) // 2 + 1) + spec.first // 2
    levels = spec.end.bit_length() - 1
    stem = torch.empty((count, tables, 2, 2), dtype=torch.int64, device=device)
    parts = torch.empty((count, lines), dtype=torch.int64, device=device)
    words, ciphers = corrections.shape[1], generator.planes(device)
    block = threads(1)
    launch(
        _stem, triton.cdiv(count, block), opened, roots, corrections, ciphers, stem, count, halves,
        words, tables, spec.depth, spec.base, party, OCTAVES=spec.per_table, BLOCK=block,
    )  # fmt: skip
    launch(
        _tables, triton.cdiv(parts.numel(), block), opened, stem, corrections,
        spec.factors(device), spec.starts(device), ciphers, parts, parts.numel(), halves, words,
        tables, lines, levels, spec.depth, spec.base, spec.step_bits, party, FIRST=spec.first,
        END=spec.end, OCTAVES=spec.per_table, BLOCK=block,
    )  # fmt: skip
    return parts.sum(1)
