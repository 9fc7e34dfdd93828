"""Scaled rows modulo 2**128 (`protocols.wide`): what is dealt, and a party's shares.

A word of 128 bits is two of 64, the lower one first.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch, threads
from mergec.runtime.kernels.transfers import integers


@triton.jit
def _read(words, place, inside):  # type: ignore[no-untyped-def]
    """Both halves of word number `place`."""
    low = tl.load(words + 2 * place, mask=inside, other=0)
    high = tl.load(words + 2 * place + 1, mask=inside, other=0)
    return low.to(tl.uint64, bitcast=True), high.to(tl.uint64, bitcast=True)


@triton.jit
def _write(words, place, low, high, inside):  # type: ignore[no-untyped-def]
    tl.store(words + 2 * place, low.to(tl.int64, bitcast=True), mask=inside)
    tl.store(words + 2 * place + 1, high.to(tl.int64, bitcast=True), mask=inside)


@triton.jit
def plus(low, high, more_low, more_high):  # type: ignore[no-untyped-def]
    total = low + more_low
    return total, high + more_high + (total < low).to(tl.uint64)


@triton.jit
def minus(low, high, less_low, less_high):  # type: ignore[no-untyped-def]
    return low - less_low, high - less_high - (low < less_low).to(tl.uint64)


@triton.jit
def times(low, high, factor):  # type: ignore[no-untyped-def]
    """Times a signed word."""
    word = factor.to(tl.uint64, bitcast=True)
    upper = high * word + tl.umulhi(low, word)
    # As an unsigned word a negative factor is 2**64 too large.
    return low * word, tl.where(factor < 0, upper - low, upper)


@kernel
def _dealt(  # type: ignore[no-untyped-def]
    mask, factor_low, factor_top, shifts, groups, out, count, size, columns, first, words,
    SIZE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    row, word = place // size, place * words
    r = tl.load(mask + place, mask=inside, other=0).to(tl.uint64, bitcast=True)
    top, nothing = r >> 63, r * 0
    _write(out, word, top, nothing, inside)
    low, high, wrapped_low, wrapped_high = nothing, nothing, nothing, nothing
    for k in range(columns):
        s = tl.load(shifts + k).to(tl.uint64)
        factor = tl.load(factor_low + row * columns + k, mask=inside, other=0).to(tl.uint64)
        bit = tl.load(factor_top + row * columns + k, mask=inside, other=0).to(tl.uint64)
        part = r >> s
        _write(out, word + 1 + tl.load(groups + k), part, nothing, inside)
        _write(out, word + first + k, part * bit, nothing, inside)
        low, high = plus(low, high, part * factor, tl.umulhi(part, factor))
        wrapped_low, wrapped_high = plus(wrapped_low, wrapped_high, factor << (64 - s), factor >> s)
        _write(out, word + first + columns + 2 + k, top * bit, nothing, inside)
    _write(out, word + first + columns, low, high, inside)
    _write(out, word + first + columns + 1, wrapped_low * top, wrapped_high * top, inside)


def words(
    mask: torch.Tensor, low: torch.Tensor, top: torch.Tensor, shifts: np.ndarray
) -> torch.Tensor:
    """The dealer's words for rows under this mask [R, d], int64 [R, d, W, 2]."""
    groups, first, width = _layout(shifts)
    out = torch.empty((*mask.shape, width, 2), dtype=torch.int64, device=mask.device)
    count = mask.numel()
    size = threads(1)
    launch(
        _dealt, triton.cdiv(count, size), mask, low, top,
        integers(tuple(shifts.tolist()), mask.device), integers(groups, mask.device), out, count,
        mask.shape[1], len(shifts), first, width, SIZE=size,
    )  # fmt: skip
    return out


@triton.jit
def _shares(own, base, wrap, row, k, columns, at_client, inside):  # type: ignore[no-untyped-def]
    """A party's share of factor k of each row, modulo 2**128."""
    less_low, less_high = _read(own, 2 * row * columns + k, inside)
    low, high = _read(own, (2 * row + 1) * columns + k, inside)
    low, high = times(low, high, wrap)
    low, high = minus(low, high, less_low, less_high)
    public = base * at_client
    return plus(
        low, high, public.to(tl.uint64, bitcast=True), (public >> 63).to(tl.uint64, bitcast=True)
    )


@kernel
def _scaled(  # type: ignore[no-untyped-def]
    opened, base, wrap, own, dealt, shifts, groups, out, count, size, columns, first, words,
    at_client, SIZE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    row, word = place // size, place * words
    z = tl.load(opened + place, mask=inside, other=0)
    top_low, top_high = _read(dealt, word, inside)
    low, high = _read(dealt, word + first + columns, inside)
    wrapped_low, wrapped_high = _read(dealt, word + first + columns + 1, inside)
    nothing = top_low * 0
    wraps_low, wraps_high = minus(nothing, nothing, wrapped_low, wrapped_high)
    for k in range(columns):
        s = tl.load(shifts + k)
        public = tl.load(base + row * columns + k, mask=inside, other=0)
        turn = tl.load(wrap + row * columns + k, mask=inside, other=0)
        x = (z.to(tl.uint64, bitcast=True) >> s.to(tl.uint64)).to(tl.int64, bitcast=True)
        x -= (z * 0 + 1) << (62 - s)
        more_low, more_high = _shares(own, public, turn, row, k, columns, at_client, inside)
        more_low, more_high = times(more_low, more_high, x)
        low, high = plus(low, high, more_low, more_high)
        more_low, more_high = _read(dealt, word + 1 + tl.load(groups + k), inside)
        more_low, more_high = times(more_low, more_high, public)
        low, high = minus(low, high, more_low, more_high)
        more_low, more_high = _read(dealt, word + first + k, inside)
        more_low, more_high = times(more_low, more_high, turn)
        low, high = minus(low, high, more_low, more_high)
        both_low, both_high = _read(dealt, word + first + columns + 2 + k, inside)
        both_low, both_high = times(both_low, both_high, turn)
        more_low, more_high = times(top_low, top_high, public)
        more_low, more_high = plus(more_low, more_high, both_low, both_high)
        up = (64 - s).to(tl.uint64)
        more_high = (more_high << up) | (more_low >> s.to(tl.uint64))
        wraps_low, wraps_high = plus(wraps_low, wraps_high, more_low << up, more_high)
    wraps_low, wraps_high = (
        tl.where(z < 0, nothing, wraps_low),
        tl.where(z < 0, nothing, wraps_high),
    )
    low, high = plus(low, high, wraps_low, wraps_high)
    _write(out, place, low, high, inside)


def scaled(
    opened: torch.Tensor,
    base: torch.Tensor,
    wrap: torch.Tensor,
    own: torch.Tensor,
    dealt: torch.Tensor,
    shifts: np.ndarray,
    at_client: bool,
) -> torch.Tensor:
    """A party's shares of scaled rows [R, d], int64 [R, d, 2], from z and what it was dealt."""
    groups, first, width = _layout(shifts)
    out = torch.empty((*opened.shape, 2), dtype=torch.int64, device=opened.device)
    count = opened.numel()
    size = threads(1)
    launch(
        _scaled, triton.cdiv(count, size), opened, base, wrap, own, dealt,
        integers(tuple(shifts.tolist()), opened.device), integers(groups, opened.device), out,
        count, opened.shape[1], len(shifts), first, width, int(at_client), SIZE=size,
    )  # fmt: skip
    return out


def _layout(shifts: np.ndarray) -> tuple[tuple[int, ...], int, int]:
    """For each column the number of its shift among different neighbours; where the words of
    columns begin; how many words an element has.
    """
    groups = tuple(np.concatenate([[0], np.cumsum(np.diff(shifts) != 0)]).tolist())
    first = groups[-1] + 2
    return groups, first, first + 2 * len(shifts) + 2
