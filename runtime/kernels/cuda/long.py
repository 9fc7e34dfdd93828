"""Sums of words with hundreds of bits (`kernels.long`): a thread for each word."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch

_SIZE = 128


@kernel
def _added(one, other, out, count, halves, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside, carry = place < count, place * 0
    for half in range(halves):
        at = place * halves + half
        total = (tl.load(one + at, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF) + carry
        total += tl.load(other + at, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
        tl.store(out + at, total.to(tl.int32), mask=inside)
        carry = total >> 32


def added(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """one + other modulo 2**(32 H), int32 [n, H]."""
    out = torch.empty_like(one)
    count, halves = one.shape
    launch(_added, triton.cdiv(count, _SIZE), one, other, out, count, halves, SIZE=_SIZE)
    return out


@kernel
def _carried(sums, out, count, halves, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside, carry = place < count, place * 0
    for half in range(halves):
        at = place * halves + half
        total = tl.load(sums + at, mask=inside, other=0) + carry
        tl.store(out + at, total.to(tl.int32), mask=inside)
        carry = total >> 32


def carry(sums: torch.Tensor, out: torch.Tensor) -> None:
    """Write words [n, H], each half of which is a sum below 2**62, to out, int32 [n, H]."""
    count, halves = sums.shape
    launch(_carried, triton.cdiv(count, _SIZE), sums, out, count, halves, SIZE=_SIZE)
