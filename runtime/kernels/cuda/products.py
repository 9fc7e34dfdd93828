"""Matrix products modulo 2**64: 64-bit multiply-add for few rows, tensor cores for many.

Few rows are limited by the memory bandwidth of the other factor, which is read once, as it is. Many
rows are cut into limbs of eight bits with a sign: the bytes of x + C less 128, where C has 128 in
each byte, so that the limbs add up to x modulo 2**64. A word of 32 bits has five of them. Tensor
cores multiply limbs exactly: a limb is at least -128 and at most 127, so a product of two is at
most 2**14, and the sum of up to eight pairs over `_DEPTH` places at most 2**23, far below 2**31.
Limbs whose weights add up to 2**64 or more are left out. Each block of places is added to a word of
64 bits, so there is no largest inner dimension.

The second factor's words are neighbours along its columns, or DOWN the inner dimension, as those of
a weight's rows are. EVEN: sizes and steps are multiples of 16, as those of most weights are. So a
cache that grows has two forms of a kernel, where Triton's own rules would make tens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch_strided

FEW = 4
"""Up to that many rows are multiplied by 64-bit words."""

_PROGRAMS = 1024
"""Programs that fill a large GPU; where there are fewer, the inner dimension is split."""

_TILE, _DEPTH = 64, 64


@triton.jit
def _even(number):  # type: ignore[no-untyped-def]
    """The number, which is a multiple of 16, so that the compiler sees it."""
    return number // 16 * 16


@kernel
def _few(  # type: ignore[no-untyped-def]
    a, b, out, rows, inner, columns, a_batch, a_row, b_batch, b_step, blocks, splits, share,
    DOWN: tl.constexpr, EVEN: tl.constexpr, ADDED: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    split, program = program % splits, program // splits
    block, program = program % blocks, program // blocks
    row, batch = program % rows, program // rows
    left = a + batch * a_batch + row * a_row
    right = b + batch * b_batch
    if EVEN:
        right, share = tl.multiple_of(right, 16), _even(share)
        b_step, inner, columns = _even(b_step), _even(inner), _even(columns)
    column = block * BLOCK + tl.arange(0, BLOCK)
    last = tl.minimum(split * share + share, inner)
    place = tl.arange(0, DEPTH)
    total = tl.zeros((DEPTH, BLOCK), tl.int64)
    for start in range(split * share, last, DEPTH):
        k = start + place
        inside = k < last
        x = tl.load(left + k, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & (column < columns)[None, :]
        words = tl.load(_words(right, k, column, b_step, DOWN), mask=mask, other=0)
        total += x[:, None] * words.to(tl.int64)
    sums = tl.sum(total, axis=0)
    target = out + (batch * rows + row) * columns + column
    if ADDED:
        tl.atomic_add(target, sums, mask=column < columns)
    else:
        tl.store(target, sums, mask=column < columns)


@triton.jit
def _words(right, k, column, step, DOWN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the words of places k and columns are, of which one or the other are neighbours."""
    if DOWN:
        return right + k[:, None] + (column * step)[None, :]
    return right + (k * step)[:, None] + column[None, :]


@triton.jit
def _limb(words, number: tl.constexpr):  # type: ignore[no-untyped-def]
    """Limb `number` of words to which C was added: the byte with its highest bit flipped."""
    return (((words >> (8 * number)) & 255) ^ 128).to(tl.int8)


@kernel
def _many(  # type: ignore[no-untyped-def]
    a, b, out, offset, rows, inner, columns, a_batch, a_row, b_batch, b_step, row_blocks, blocks,
    DOWN: tl.constexpr, EVEN: tl.constexpr, LIMBS: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row_block, program = program % row_blocks, program // row_blocks
    block, batch = program % blocks, program // blocks
    left = a + batch * a_batch
    right = b + batch * b_batch
    if EVEN:
        right = tl.multiple_of(right, 16)
        b_step, inner, columns = _even(b_step), _even(inner), _even(columns)
    row = row_block * TILE + tl.arange(0, TILE)
    column = block * TILE + tl.arange(0, TILE)
    place = tl.arange(0, DEPTH).to(tl.int64)
    added = tl.load(offset)
    total = tl.zeros((TILE, TILE), tl.int64)
    for start in range(0, inner, DEPTH):
        k = start + place
        inside = k < inner
        x = tl.load(
            left + (row * a_row)[:, None] + k[None, :],
            mask=(row < rows)[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        mask = inside[:, None] & (column < columns)[None, :]
        y = tl.load(_words(right, k, column, b_step, DOWN), mask=mask, other=0)
        x, y = x.to(tl.int64) + added, y.to(tl.int64) + added
        for weight in tl.static_range(8):
            found = tl.zeros((TILE, TILE), tl.int32)
            for number in tl.static_range(LIMBS):
                if number <= weight:
                    found = tl.dot(
                        _limb(x, weight - number), _limb(y, number), found, out_dtype=tl.int32
                    )
            total += found.to(tl.int64) << (8 * weight)
    target = out + (batch * rows + row)[:, None] * columns + column[None, :]
    tl.store(target, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


_OFFSET = sum(128 << (8 * number) for number in range(8)) - 2**64
"""C, as a signed word."""


def batched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` modulo 2**64 of [B, M, K] and [B, K, N], of any strides; int32 or int64 words."""
    count, rows, inner = a.shape
    columns = b.shape[2]
    a = a if a.stride(2) == 1 else a.contiguous()
    down = b.stride(2) != 1 and b.stride(1) == 1
    b = b if down or b.stride(2) == 1 else b.contiguous()
    step = b.stride(2 if down else 1)
    strides = a.stride(0), a.stride(1), b.stride(0), step
    even = not any(
        number % 16 for number in (inner, columns, b.stride(0), step, b.storage_offset())
    )
    shape, layout = (count, rows, columns), {"DOWN": down, "EVEN": even}
    if rows <= FEW:
        depth, block = (128, 16) if down else (16, 128)
        blocks = triton.cdiv(columns, block)
        programs = count * rows * blocks
        splits = max(1, min(triton.cdiv(inner, 8 * depth), _PROGRAMS // max(1, programs)))
        share = triton.cdiv(triton.cdiv(inner, splits), depth) * depth
        make = torch.zeros if splits > 1 else torch.empty
        out = make(shape, dtype=torch.int64, device=a.device)
        launch_strided(
            _few, programs * splits, a, b, out, rows, inner, columns, *strides, blocks, splits,
            share, **layout, ADDED=splits > 1, DEPTH=depth, BLOCK=block,
        )  # fmt: skip
        return out
    out = torch.empty(shape, dtype=torch.int64, device=a.device)
    row_blocks, blocks = triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE)
    offset = torch.full((1,), _OFFSET, dtype=torch.int64, device=a.device)
    launch_strided(
        _many, count * row_blocks * blocks, a, b, out, offset, rows, inner, columns, *strides,
        row_blocks, blocks, **layout, LIMBS=5 if b.dtype is torch.int32 else 8, TILE=_TILE,
        DEPTH=_DEPTH, num_warps=8,
    )  # fmt: skip
    return out


def by_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` of [R, I] and [O, I]."""
    return batched(x[None], weight.T[None])[0]


def by_columns(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight` of [R, V] and [V, D]."""
    return batched(x[None], weight[None])[0]
