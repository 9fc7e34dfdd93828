"""What a party computes from an opened number and dealt words, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch
from mergec.runtime.kernels.transfers import integers

_SIZE = 1024
"""Elements of a program."""

_TILE = 4096
"""Words of a program that adds up several for each element."""


@triton.jit
def low_of(word, shift, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logical right shift of a word of WIDTH bits, given as int64 (`truncate.low_of`)."""
    if WIDTH == 32:
        word = word & 0xFFFFFFFF
    return (word.to(tl.uint64, bitcast=True) >> shift.to(tl.uint64)).to(tl.int64, bitcast=True)


@triton.jit
def base_of(z, shift, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """`Truncation.base` of an opened word."""
    return low_of(z, shift, WIDTH) - ((z * 0 + 1) << (WIDTH - 2 - shift))


@triton.jit
def wrap_of(z, shift, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """`Truncation.wrap` of an opened word; shifts in two steps because 2**64 does not fit."""
    return (z >= 0).to(tl.int64) << (WIDTH - shift - 1) << 1


def _width(words: torch.Tensor) -> int:
    return 8 * words.element_size()


@kernel
def _truncated(  # type: ignore[no-untyped-def]
    opened, words, out, count, shift, at_client, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    z = tl.load(opened + place, mask=inside, other=0).to(tl.int64)
    low = tl.load(words + place, mask=inside, other=0)
    top = tl.load(words + count + place, mask=inside, other=0)
    found = at_client * base_of(z, shift, WIDTH) - low + wrap_of(z, shift, WIDTH) * top
    tl.store(out + place, found, mask=inside)


def truncated(
    opened: torch.Tensor, words: torch.Tensor, shift: int, at_client: bool
) -> torch.Tensor:
    """A share of x >> shift, from z and the shares of low and top [2, ...] (`Truncation`)."""
    out = torch.empty(opened.shape, dtype=torch.int64, device=opened.device)
    count = opened.numel()
    launch(
        _truncated, triton.cdiv(count, _SIZE), opened, words, out, count, shift, int(at_client),
        WIDTH=_width(opened), SIZE=_SIZE,
    )  # fmt: skip
    return out


@kernel
def _squared(opened, dealt, out, count, shift, at_client, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    z = tl.load(opened + place, mask=inside, other=0)
    top = tl.load(dealt + place, mask=inside, other=0)
    low = tl.load(dealt + count + place, mask=inside, other=0)
    square = tl.load(dealt + 2 * count + place, mask=inside, other=0)
    both = tl.load(dealt + 3 * count + place, mask=inside, other=0)
    base, wrap = base_of(z, shift, 64), wrap_of(z, shift, 64)
    mixed = wrap * (wrap + 2 * base) * top - 2 * base * low - 2 * wrap * both
    tl.store(out + place, at_client * base * base + square + mixed, mask=inside)


def squared(opened: torch.Tensor, dealt: torch.Tensor, shift: int, at_client: bool) -> torch.Tensor:
    """A share of (x >> shift)**2, from z and the shares of `squares.deal_square` [4, ...]."""
    out = torch.empty(opened.shape, dtype=torch.int64, device=opened.device)
    count = opened.numel()
    launch(
        _squared, triton.cdiv(count, _SIZE), opened, dealt, out, count, shift, int(at_client),
        SIZE=_SIZE,
    )  # fmt: skip
    return out


@kernel
def _evaluated(  # type: ignore[no-untyped-def]
    bits, words, coefficients, out, count, payloads, size, SIZE: tl.constexpr, WORDS: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    byte = tl.load(bits + place // payloads, mask=inside, other=0).to(tl.int64)
    j = tl.arange(0, WORDS)
    used = inside[:, None] & (j < size)[None, :]
    row = tl.load(coefficients + (byte * size)[:, None] + j[None, :], mask=used, other=0)
    dealt = tl.load(words + (place * size)[:, None] + j[None, :], mask=used, other=0)
    total = tl.sum(row * dealt.to(tl.int64), axis=1)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def evaluated(bits: torch.Tensor, words: torch.Tensor, formula: Any) -> torch.Tensor:
    """A `Formula` of opened bits [...]: shares [..., payloads] from words [..., payloads, W]."""
    coefficients = formula.rows(bits.device)
    out = torch.empty(words.shape[:-1], dtype=words.dtype, device=words.device)
    size = words.shape[-1]
    wide = triton.next_power_of_2(size)
    each = max(1, _TILE // wide)
    launch(
        _evaluated, triton.cdiv(out.numel(), each), bits, words, coefficients, out, out.numel(),
        words.shape[-2], size, SIZE=each, WORDS=wide,
    )  # fmt: skip
    return out


@kernel
def _looked_up(  # type: ignore[no-untyped-def]
    points, tables, places, out, count, elements, row, relations, SIZE: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    point = tl.load(points + place, mask=inside, other=0)
    table = tables + (place % elements) * row
    byte = point * 0
    for k in range(relations):
        shift, ones = tl.load(places + 3 * k), tl.load(places + 3 * k + 1)
        v = (point >> shift) & ones
        packed = tl.load(table + tl.load(places + 3 * k + 2) + (v >> 3), mask=inside, other=0)
        byte |= ((packed.to(tl.int64) >> (v & 7)) & 1) << k
    tl.store(out + place, byte.to(tl.uint8), mask=inside)


def looked_up(points: torch.Tensor, tables: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    """Bits of tables [n, bytes] at public points [..., n], one byte for each (`digits.look_up`)."""
    out = torch.empty(points.shape, dtype=torch.uint8, device=points.device)
    count = points.numel()
    launch(
        _looked_up, triton.cdiv(count, _SIZE), points, tables,
        integers(tuple(places.reshape(-1).tolist()), points.device), out, count, len(tables),
        tables.shape[1], len(places), SIZE=_SIZE,
    )  # fmt: skip
    return out


@kernel
def _line(  # type: ignore[no-untyped-def]
    total, bits, words, opened, coefficients, factors, lines, count, parts, size, shift,
    CROSSED: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    j = tl.arange(0, WORDS)
    used = inside[:, None] & (j < size)[None, :]
    byte = tl.load(bits + place, mask=inside, other=0).to(tl.int64)
    row = tl.load(coefficients + (byte * size)[:, None] + j[None, :], mask=used, other=0)
    z = tl.load(opened + place, mask=inside, other=0).to(tl.int64)
    scale, constant = tl.load(lines), tl.load(lines + 1)
    first = scale * base_of(z, shift, 32) + constant
    last = scale * wrap_of(z, shift, 32)
    value = z * 0
    for part in range(parts):
        weight = tl.where(part == 0, first, tl.where(part == 1, -scale, last))
        at = (place * parts * (2 if CROSSED else 1) + part) * size
        dealt = tl.load(words + at[:, None] + j[None, :], mask=used, other=0)
        found = tl.sum(row * dealt, axis=1)
        if CROSSED:
            times = tl.load(factors + place, mask=inside, other=0)
            again = tl.load(words + (at + parts * size)[:, None] + j[None, :], mask=used, other=0)
            found = found * times - tl.sum(row * again, axis=1)
        value += weight * found
    before = tl.load(total + place, mask=inside, other=0)
    tl.store(total + place, before + value, mask=inside)


def add_line(
    total: torch.Tensor,
    bits: torch.Tensor,
    words: torch.Tensor,
    opened: torch.Tensor,
    selection: Any,
    factors: torch.Tensor | None,
) -> None:
    """Add shares of a `Selection` to total [n], from opened bits [n] and z, int32 [n].

    words: [n, parts, W]. factors: y', [n], or None.
    """
    line = selection.line
    coefficients = selection.formula.rows(total.device)
    parts, size = words.shape[1] // (1 if factors is None else 2), words.shape[2]
    wide = triton.next_power_of_2(size)
    each = max(1, _TILE // wide)
    lines = integers((_wrapped(line.scale), _wrapped(line.constant)), total.device)
    launch(
        _line, triton.cdiv(len(total), each), total, bits, words, opened,
        coefficients, total if factors is None else factors, lines, len(total), parts,
        size, line.shift, CROSSED=factors is not None, SIZE=each, WORDS=wide,
    )  # fmt: skip


def _wrapped(number: int) -> int:
    """The number modulo 2**64, with a sign."""
    return (number + 2**63) % 2**64 - 2**63


@kernel
def _scaled(  # type: ignore[no-untyped-def]
    opened, mask, top, share, base, wrap, row_wrap, dealt, both, shifts, out, count, length,
    columns, words, down, tops, far, SIZE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    row = place // length
    z = tl.load(opened + place, mask=inside, other=0)
    r = tl.load(mask + place, mask=inside, other=0)
    own = dealt + place * words
    last = own + down + tops
    total = tl.load(last, mask=inside, other=0)
    both_wrap = z * 0
    for k in range(columns):
        shift = tl.load(shifts + 2 * k)
        number = tl.load(shifts + 2 * k + 1)
        at = row * columns + k
        factor = tl.load(share + at, mask=inside, other=0)
        public = tl.load(base + at, mask=inside, other=0)
        wraps = tl.load(wrap + at, mask=inside & (at * 0 + tops > 0), other=0)
        topped = tl.load(own + down + k, mask=inside & (at * 0 + tops > 0), other=0)
        right = tl.maximum(shift, 1)
        left = tl.maximum(-shift, 0)
        low = tl.load(own + number, mask=inside & (place * 0 + shift > 0), other=0)
        x = tl.where(shift > 0, base_of(z, right, 64), (z - ((z * 0 + 1) << 62)) << left)
        low = tl.where(shift > 0, low, r << left)
        total += x * factor - low * public - topped * wraps
        crossing = place * 0 + k - (columns - far)
        cross = tl.load(both + place * far + crossing, mask=inside & (crossing >= 0), other=0)
        both_wrap += wrap_of(z * 0, right, 64) * wraps * cross.to(tl.int64)
    no_top = (z >= 0).to(tl.int64)
    of_row = tl.load(row_wrap + row, mask=inside, other=0)
    own_top = tl.load(top + place, mask=inside, other=0)
    crossed = tl.load(last + 1, mask=inside, other=0)
    total += no_top * (of_row * own_top - crossed + both_wrap)
    tl.store(out + place, total, mask=inside)


def scaled(
    opened: torch.Tensor,
    mask: torch.Tensor,
    top: torch.Tensor,
    base: torch.Tensor,
    wrap: torch.Tensor,
    low: torch.Tensor,
    factor_top: torch.Tensor,
    dealt: torch.Tensor,
    both: torch.Tensor,
    shifts: np.ndarray,
    at_client: bool,
) -> torch.Tensor:
    """Shares of rows times their factors: see `normalize.scale_rows` and its reference."""
    out = torch.empty(opened.shape, dtype=torch.int64, device=opened.device)
    pairs, down = numbered(shifts)
    wraps = [_wrapped(1 << (64 - s)) if s > 0 else 0 for s in shifts.tolist()]
    device, count = opened.device, opened.numel()
    share = base - low if at_client else -low
    share = share + wrap * factor_top if wrap.shape[1] else share
    row_wrap = (base * integers(tuple(wraps), device)).sum(1)
    launch(
        _scaled, triton.cdiv(count, 256), opened, mask, top,
        share, base, wrap, row_wrap, dealt, both,
        integers(tuple(pairs), device), out, count, opened.shape[1], len(shifts), dealt.shape[2],
        down, wrap.shape[1], both.shape[2], SIZE=256,
    )  # fmt: skip
    return out


def numbered(shifts: np.ndarray) -> tuple[list[int], int]:
    """Each shift, and the number of the word that holds what is shifted down by it, where equal
    neighbours share one; and how many of these words there are.
    """
    pairs, number, last = [], -1, 0
    for shift in shifts.tolist():
        number += shift > 0 and shift != last
        last = shift
        pairs += [shift, number]
    return pairs, number + 1
