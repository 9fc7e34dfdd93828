"""Tables of exponentials with words of many bits (`protocols.broad`): what is dealt, and read.

A table has `windows` words of `halves` 32-bit halves each, the lowest first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch
from mergec.runtime.kernels.cuda.long import carry

_SIZE = 128


@kernel
def _corrected(share, mantissas, shifts, count, halves, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    shift = tl.load(shifts + place, mask=inside, other=0)
    wide = tl.load(mantissas + place, mask=inside, other=0) << (shift & 31)
    first = shift >> 5
    borrow = place * 0
    for half in range(halves):
        at = share + place * halves + half
        own = tl.where(first == half, wide & 0xFFFFFFFF, 0)
        own += tl.where(first + 1 == half, (wide >> 32) & 0xFFFFFFFF, 0)
        left = own - (tl.load(at, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF) - borrow
        tl.store(at, left.to(tl.int32), mask=inside)
        borrow = (left < 0).to(tl.int64)


def corrected(share: torch.Tensor, mask: torch.Tensor, table: Any) -> None:
    """Turn the client's share of tables, int32 halves [n, windows * halves], into the server's."""
    mantissas, shifts = table.dealt_at(mask)
    count = mantissas.numel()
    launch(
        _corrected, triton.cdiv(count, _SIZE), share, mantissas, shifts, count, table.halves,
        SIZE=_SIZE,
    )  # fmt: skip


@triton.jit
def _entry(  # type: ignore[no-untyped-def]
    dealt, entries, mantissas, places, place, inside, row, halves
):
    """The word of each element's table that is read, its factor, and where the product begins: a
    half, and a bit of it."""
    word = dealt + place * row + tl.load(entries + place, mask=inside, other=0) * halves
    mantissa = tl.load(mantissas + place, mask=inside, other=0)
    begin = tl.load(places + place, mask=inside, other=0)
    return word, mantissa, begin >> 5, begin & 31


@kernel
def _values(dealt, entries, mantissas, places, out, count, row, halves, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    word, mantissa, first, off = _entry(
        dealt, entries, mantissas, places, place, inside, row, halves
    )
    found, carry = place * 0, place * 0
    for half in range(halves):
        product = (tl.load(word + half, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF) * mantissa
        product += carry
        carry = product >> 32
        product = product & 0xFFFFFFFF
        found |= tl.where(first == half, product >> off, 0)
        found |= tl.where(first + 1 == half, product << (32 - off), 0)
        # A shift by 64 bits is no shift.
        above = tl.where(off > 0, product << (63 - tl.maximum(off, 1)) << 1, 0)
        found |= tl.where(first + 2 == half, above, 0)
    tl.store(out + place, found, mask=inside)


def values(dealt: torch.Tensor, opened: torch.Tensor, table: Any, out: torch.Tensor) -> None:
    """Write a party's shares, rounded down, to out [n], from its tables."""
    count, row = dealt.shape
    launch(
        _values, triton.cdiv(count, _SIZE), dealt, *table.read_at(opened), out, count, row,
        table.halves, SIZE=_SIZE,
    )  # fmt: skip


@kernel
def _sums(  # type: ignore[no-untyped-def]
    dealt, entries, mantissas, places, rows, out, count, row, halves, width, SIZE: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    word, mantissa, first, off = _entry(
        dealt, entries, mantissas, places, place, inside, row, halves
    )
    target = out + tl.load(rows + place, mask=inside, other=0) * width
    over, below = place * 0, place * 0
    # With a half of zeros above the word, which shifts its highest one out.
    for half in range(halves + 1):
        real = inside & (place * 0 + half < halves)
        product = (tl.load(word + half, mask=real, other=0).to(tl.int64) & 0xFFFFFFFF) * mantissa
        product = tl.where(real, product + over, 0)
        over = product >> 32
        product = product & 0xFFFFFFFF
        part = (below >> off) | ((product << (32 - off)) & 0xFFFFFFFF)
        at = half - 1 - first
        tl.atomic_add(target + at, part, mask=inside & (at >= 0) & (at < width))
        below = product


def sums(
    dealt: torch.Tensor, opened: torch.Tensor, rows: torch.Tensor, table: Any, out: torch.Tensor
) -> None:
    """Add a party's shares, rounded down, to the rows of out, int32 halves [R, H]."""
    total = out.long() & 0xFFFFFFFF
    count, row = dealt.shape
    launch(
        _sums, triton.cdiv(count, _SIZE), dealt, *table.read_at(opened), rows, total, count, row,
        table.halves, out.shape[1], SIZE=_SIZE,
    )  # fmt: skip
    carry(total, out)
