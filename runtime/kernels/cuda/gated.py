"""Gated units by one opening (`protocols.gated`): what is dealt, and a party's shares.

Words are in planes: of all words of an element the same four bytes, or the same one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch, threads
from mergec.runtime.kernels.cuda.wide import minus, plus, times


@triton.jit
def _plane(bytes_, fours, planes, number, place, row, term, inside):  # type: ignore[no-untyped-def]
    """A plane's words [elements, terms], where each is as four bytes and as one, and which of
    both it is, if the element has it."""
    offset = tl.load(planes + 4 * number + 3)
    exists = inside[:, None] & (term < term * 0 + tl.load(planes + 4 * number + 2))[None, :]
    wide = exists & ((term * 0 + tl.load(planes + 4 * number + 1)) == 4)[None, :]
    byte = exists & (wide == 0)
    start = place * row + offset
    at_fours = fours + (start // 4)[:, None] + term[None, :]
    at_byte = bytes_ + start[:, None] + term[None, :]
    words = tl.load(at_fours, mask=wide, other=0).to(tl.int64) & 0xFFFFFFFF
    words |= tl.load(at_byte, mask=byte, other=0).to(tl.int64)
    return words, at_fours, at_byte, wide, byte


@kernel
def _corrected(  # type: ignore[no-untyped-def]
    share, fours, words, parts, planes, firsts, ups, count, row, terms,
    TERMS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    term = tl.arange(0, TERMS).to(tl.int64)
    inside, real = place < count, term < terms
    every = inside[:, None] & real[None, :]
    own = tl.load(words + (place * terms)[:, None] + term[None, :], mask=every, other=0)
    up = tl.load(ups + term, mask=real, other=0).to(tl.uint64)[None, :]
    for word in range(3):
        factor = tl.load(parts + 3 * place + word, mask=inside, other=0)
        spread = own * 0 + factor[:, None]
        low, high = times(spread.to(tl.uint64, bitcast=True), (own * 0).to(tl.uint64), own)
        # In two steps, because nothing can be shifted by 64.
        high = (high << up) | ((low >> 1) >> (63 - up))
        low = low << up
        borrow = own * 0
        for number in range(tl.load(firsts + word), tl.load(firsts + word + 1)):
            theirs, at_fours, at_byte, wide, byte = _plane(
                share, fours, planes, number, place, row, term, inside
            )
            position = own * 0 + tl.load(planes + 4 * number)
            source = tl.where(position >= 8, high, low)
            down = (8 * (position & 7)).to(tl.uint64)
            piece = (source >> down).to(tl.int64, bitcast=True)
            left = tl.where(wide, piece & 0xFFFFFFFF, piece & 255) - theirs - borrow
            tl.store(at_fours, left.to(tl.int32), mask=wide)
            tl.store(at_byte, left.to(tl.uint8), mask=byte)
            borrow = tl.where(wide | byte, (left < 0).to(tl.int64), 0)


def corrected(share: torch.Tensor, words: torch.Tensor, parts: torch.Tensor, table: Any) -> None:
    """Turn the client's share of planes, uint8 [n, row], into the server's."""
    planes, firsts, ups = table.layout(share.device)
    (count, row), terms = share.shape, table.terms
    lanes = triton.next_power_of_2(terms)
    size = threads(lanes)
    launch(
        _corrected, triton.cdiv(count, size), share, share.view(torch.int32), words, parts,
        planes, firsts, ups, count, row, terms, TERMS=lanes, SIZE=size,
    )  # fmt: skip


@kernel
def _values(  # type: ignore[no-untyped-def]
    dealt, fours, basis, base, wrap, planes, firsts, out, count, row, terms, bits,
    TERMS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    term = tl.arange(0, TERMS).to(tl.int64)
    inside = place < count
    every = inside[:, None] & (term < terms)[None, :]
    public = tl.load(basis + (place * terms)[:, None] + term[None, :], mask=every, other=0)
    nothing = (place * 0).to(tl.uint64)
    low, high = nothing, nothing
    for word in range(3):
        own_low, own_high = nothing, nothing
        for number in range(tl.load(firsts + word), tl.load(firsts + word + 1)):
            words, _, _, _, _ = _plane(dealt, fours, planes, number, place, row, term, inside)
            total = tl.sum(words * public, 1)
            position = place * 0 + tl.load(planes + 4 * number)
            up = 8 * (position & 7)
            part = total.to(tl.uint64, bitcast=True) << up.to(tl.uint64)
            over = ((total >> 1) >> (63 - up)).to(tl.uint64, bitcast=True)
            upper = position >= 8
            own_low, own_high = plus(
                own_low, own_high, tl.where(upper, nothing, part), tl.where(upper, part, over)
            )
        if word == 0:
            factor = tl.load(base + place, mask=inside, other=0)
            own_low, own_high = times(own_low, own_high, factor)
        elif word == 1:
            own_low, own_high = minus(nothing, nothing, own_low, own_high)
        else:
            up = (place * 0 + bits).to(tl.uint64)
            wraps = tl.load(wrap + place, mask=inside, other=0) != 0
            own_high = tl.where(wraps, (own_high << up) | (own_low >> (64 - up)), nothing)
            own_low = tl.where(wraps, own_low << up, nothing)
        low, high = plus(low, high, own_low, own_high)
    share = ((low >> 32) | (high << 32)).to(tl.int64, bitcast=True)
    tl.store(out + place, tl.load(out + place, mask=inside, other=0) + share, mask=inside)


def values(
    dealt: torch.Tensor,
    basis: torch.Tensor,
    base: torch.Tensor,
    wrap: torch.Tensor,
    table: Any,
    out: torch.Tensor,
) -> None:
    """Add a party's shares, rounded down, to out [n], from its planes, uint8 [n, row]."""
    planes, firsts, _ = table.layout(dealt.device)
    (count, row), terms = dealt.shape, table.terms
    lanes = triton.next_power_of_2(terms)
    size = threads(lanes)
    launch(
        _values, triton.cdiv(count, size), dealt, dealt.view(torch.int32), basis, base, wrap,
        planes, firsts, out, count, row, terms, table.factor_bits, TERMS=lanes, SIZE=size,
    )  # fmt: skip
