"""Trees of point functions: each thread walks two paths from the roots of their trees.

A thread needs nothing from another one, so a kernel is one loop over the levels, and it holds two
seeds in registers wherever its paths end. That costs up to twice the encryptions that a shared walk
needs, and saves writing and reading each level. Which way a path turns is a public number at the
parties. At the dealer it is secret, and selects by masks; no address depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.cipher import encrypt
from mergec.runtime.kernels.cuda.launch import kernel, launch, threads
from mergec.runtime.kernels.cuda.wide import minus, plus, times
from mergec.runtime.kernels.transfers import integers

_HALF = (1 << 32) - 1

ROUND_PLANES = tl.constexpr(88)
"""Words of a cipher's planes: 11 round keys of 8."""


@triton.jit
def low_half(word):  # type: ignore[no-untyped-def]
    return word.to(tl.uint32)


@triton.jit
def high_half(word):  # type: ignore[no-untyped-def]
    return (word >> 32).to(tl.uint32)


@triton.jit
def joined(low, high):  # type: ignore[no-untyped-def]
    """The int64 word of two halves."""
    return (low.to(tl.uint64) | (high.to(tl.uint64) << 32)).to(tl.int64, bitcast=True)


@triton.jit
def spread(flag):  # type: ignore[no-untyped-def]
    """A mask of 32 equal bits as one of 64."""
    return flag.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def mask_of(bit):  # type: ignore[no-untyped-def]
    """All ones where an integer's lowest bit is set, as uint32."""
    return (-(bit & 1)).to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def root_of(roots, key, inside):  # type: ignore[no-untyped-def]
    """The four words of a key's root, without the two lowest bits of each half."""
    first = tl.load(roots + 2 * key, mask=inside, other=0)
    second = tl.load(roots + 2 * key + 1, mask=inside, other=0)
    return (
        low_half(first) & 0xFFFFFFFC, high_half(first),
        low_half(second) & 0xFFFFFFFC, high_half(second),
    )  # fmt: skip


@triton.jit
def corrected(s0, s1, s2, s3, flag, corrections, place, inside):  # type: ignore[no-untyped-def]
    """A seed with the correction word at `place` added where its flag is set."""
    first = tl.load(corrections + place, mask=inside, other=0)
    second = tl.load(corrections + place + 1, mask=inside, other=0)
    return (
        s0 ^ (flag & low_half(first)), s1 ^ (flag & high_half(first)),
        s2 ^ (flag & low_half(second)), s3 ^ (flag & high_half(second)),
    )  # fmt: skip


@triton.jit
def step(  # type: ignore[no-untyped-def]
    a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, turn_a, turn_b, ciphers, corrections, at_a, at_b,
    in_a, in_b,
):  # fmt: skip
    """Two nodes move to their right children where `turn` is all ones, else to the left ones.

    fa, fb: all ones where a control bit is set. at: places of corrections. in: where there are any.
    """
    e0, e1, e2, e3, g0, g1, g2, g3 = encrypt(
        a0, a1, a2, a3, b0, b1, b2, b3, ciphers, ciphers + ROUND_PLANES,
        (turn_a & 0x55555555) | (turn_b & 0xAAAAAAAA), 10, True,
    )  # fmt: skip
    a0, a1, a2, a3 = corrected(a0, a1, a2, a3, fa, corrections, at_a, in_a)
    b0, b1, b2, b3 = corrected(b0, b1, b2, b3, fb, corrections, at_b, in_b)
    a0, a1, a2, a3 = a0 ^ e0, a1 ^ e1, a2 ^ e2, a3 ^ e3
    b0, b1, b2, b3 = b0 ^ g0, b1 ^ g1, b2 ^ g2, b3 ^ g3
    fa = mask_of(a0 >> (turn_a & 1))
    fb = mask_of(b0 >> (turn_b & 1))
    return a0 & 0xFFFFFFFC, a1, a2, a3, fa, b0 & 0xFFFFFFFC, b1, b2, b3, fb


@triton.jit
def value(  # type: ignore[no-untyped-def]
    a0, a1, a2, a3, b0, b1, b2, b3, ciphers, number
):
    """Block `number` of the values of two leaves, before their correction: int64 pairs."""
    own = ciphers + (2 + number) * ROUND_PLANES
    e0, e1, e2, e3, g0, g1, g2, g3 = encrypt(
        a0, a1, a2, a3, b0, b1, b2, b3, own, own, a0, 10, False
    )
    return (
        joined(a0 ^ e0, a1 ^ e1), joined(a2 ^ e2, a3 ^ e3),
        joined(b0 ^ g0, b1 ^ g1), joined(b2 ^ g2, b3 ^ g3),
    )  # fmt: skip


@triton.jit
def rows_of(  # type: ignore[no-untyped-def]
    a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, ciphers, corrections, inside
):
    """The four words of each of two leaves, with their correction, which both have in common."""
    w0 = tl.load(corrections, mask=inside, other=0)
    w1 = tl.load(corrections + 1, mask=inside, other=0)
    w2 = tl.load(corrections + 2, mask=inside, other=0)
    w3 = tl.load(corrections + 3, mask=inside, other=0)
    p0, p1, r0, r1 = value(a0, a1, a2, a3, b0, b1, b2, b3, ciphers, 0)
    p2, p3, r2, r3 = value(a0, a1, a2, a3, b0, b1, b2, b3, ciphers, 1)
    own, other = spread(fa), spread(fb)
    return (
        p0 + (own & w0), p1 + (own & w1), p2 + (own & w2), p3 + (own & w3),
        r0 + (other & w0), r1 + (other & w1), r2 + (other & w2), r3 + (other & w3),
    )  # fmt: skip


@triton.jit
def turn_of(place, depth, level):  # type: ignore[no-untyped-def]
    """Which way leads from `level` to a leaf, as a mask."""
    return mask_of(place >> (depth - 1 - level))


# ------------------------------------------------------------------------------- piecewise cubics


@triton.jit
def cubic(one, r, square, cube, a, coefficients, window, used):  # type: ignore[no-untyped-def]
    """What a row with these words adds to the value at position `a` of a window."""
    f0, f1, f2, f3 = _factors(a, coefficients, window, used)
    return one * f0 + r * f1 + square * f2 + cube * f3


@triton.jit
def _factors(a, coefficients, window, used):  # type: ignore[no-untyped-def]
    """What the words of a row count in the value at position `a` of a window."""
    row = coefficients + 4 * window
    c0 = tl.load(row, mask=used, other=0)
    c1 = tl.load(row + 1, mask=used, other=0)
    c2 = tl.load(row + 2, mask=used, other=0)
    c3 = tl.load(row + 3, mask=used, other=0)
    return (
        c0 + a * (c1 + a * (c2 + a * c3)), -(c1 + a * (2 * c2 + 3 * a * c3)), c2 + 3 * a * c3, -c3,
    )  # fmt: skip


@kernel
def _table(  # type: ignore[no-untyped-def]
    points, roots, corrections, coefficients, ciphers, out, count, words, depth, step_bits, drop,
    party, LANES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Thread (key, lane) has leaves `lane` and `lane + LANES` of the key's tree.
    thread = tl.arange(0, KEYS * LANES)
    key = tl.program_id(0).to(tl.int64) * KEYS + thread // LANES
    inside = key < count
    leaf = (thread % LANES).to(tl.int64)
    a0, a1, a2, a3 = root_of(roots, key, inside)
    b0, b1, b2, b3 = a0, a1, a2, a3
    fa = mask_of(leaf * 0 + party)
    fb = fa
    for level in range(depth):
        at = words * key + 2 * level
        a0, a1, a2, a3, fa, b0, b1, b2, b3, fb = step(
            a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, turn_of(leaf, depth, level),
            turn_of(leaf + LANES, depth, level), ciphers, corrections, at, at, inside, inside,
        )  # fmt: skip
    p0, p1, p2, p3, r0, r1, r2, r3 = rows_of(
        a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, ciphers, corrections + words * key + 2 * depth,
        inside,
    )  # fmt: skip
    z = tl.load(points + key, mask=inside, other=0)
    one = z * 0 + 1
    position = (z & ((one << step_bits) - 1)) >> drop
    window = (z >> step_bits) - leaf
    total = cubic(
        p0, p1, p2, p3, position, coefficients, window & (2 * LANES - 1), inside,
    )  # fmt: skip
    total += cubic(
        r0, r1, r2, r3, position, coefficients, (window - LANES) & (2 * LANES - 1), inside,
    )  # fmt: skip
    total = tl.sum(tl.reshape(total, (KEYS, LANES)), axis=1)
    keys = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    tl.store(out + keys, tl.where(party == 1, -total, total), mask=keys < count)


def table_values(
    points: torch.Tensor,
    roots: torch.Tensor,
    corrections: torch.Tensor,
    table: Any,
    party: int,
    generator: Any,
) -> torch.Tensor:
    """A party's shares of the values of an `interval.Table` at public points [n]."""
    count, windows = len(points), table.windows
    device = points.device
    out = torch.empty(count, dtype=torch.int64, device=points.device)
    lanes = windows // 2
    keys = threads(lanes)
    launch(
        _table, triton.cdiv(count, keys), points, roots, corrections,
        table.factors(device), generator.planes(device), out, count, corrections.shape[1],
        windows.bit_length() - 1, table.step_bits, table.drop, party, LANES=lanes, KEYS=keys,
    )  # fmt: skip
    return out


@triton.jit
def _moved(word, drop):  # type: ignore[no-untyped-def]
    """A 64-bit word shifted down, or up if `drop` is negative."""
    unsigned = word.to(tl.uint64, bitcast=True)
    down = unsigned >> tl.maximum(drop, 0).to(tl.uint64)
    up = unsigned << tl.maximum(-drop, 0).to(tl.uint64)
    return tl.where(drop >= 0, down, up).to(tl.int64, bitcast=True)


@triton.jit
def _wide_cubic(  # type: ignore[no-untyped-def]
    low, high, first, second, flag, corrections, number, factor, inside
):
    """Add number `number` of a row, of 128 bits in two words, times a factor."""
    one = tl.load(corrections + 2 * number, mask=inside, other=0)
    other = tl.load(corrections + 2 * number + 1, mask=inside, other=0)
    word_low, word_high = plus(
        first.to(tl.uint64, bitcast=True), second.to(tl.uint64, bitcast=True),
        (flag & one).to(tl.uint64, bitcast=True), (flag & other).to(tl.uint64, bitcast=True),
    )  # fmt: skip
    word_low, word_high = times(word_low, word_high, factor)
    return plus(low, high, word_low, word_high)


@kernel
def _octave(  # type: ignore[no-untyped-def]
    points, roots, corrections, coefficients, ciphers, nodes, out, count, lines, words, columns,
    top, depth, step_bits, party, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Thread (key, line) has the two nodes of a line of the list; both belong to one octave.
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < count
    key, row = pair // lines, nodes + 8 * (pair % lines)
    end = tl.load(row, mask=inside, other=1)
    window = tl.load(row + 1, mask=inside, other=0)
    bound = tl.load(row + 2, mask=inside, other=0)
    column = tl.load(row + 3, mask=inside, other=0)
    drop = tl.load(row + 4, mask=inside, other=0)
    table = tl.load(row + 5, mask=inside, other=0)
    correction = tl.load(row + 6, mask=inside, other=0)
    z = tl.load(points + key, mask=inside, other=0)
    # A row's number is the opened number, in units of its windows, minus the window.
    shifted = z >> (top - end)
    ones = ((z * 0 + 1) << end) - 1
    last = bound + (shifted & 1)
    first, second = (shifted - window) & ones, (shifted - window - 1) & ones
    a0, a1, a2, a3 = root_of(roots, key, inside)
    b0, b1, b2, b3 = a0, a1, a2, a3
    fa = mask_of(pair * 0 + party)
    fb = fa
    for level in range(depth):
        walks = level < end
        at = words * key + 2 * level
        n0, n1, n2, n3, nf, m0, m1, m2, m3, mf = step(
            a0, a1, a2, a3, fa, b0, b1, b2, b3, fb,
            turn_of(first, tl.maximum(end, level + 1), level),
            turn_of(second, tl.maximum(end, level + 1), level),
            ciphers, corrections, at, at, inside, inside,
        )  # fmt: skip
        a0, a1 = tl.where(walks, n0, a0), tl.where(walks, n1, a1)
        a2, a3 = tl.where(walks, n2, a2), tl.where(walks, n3, a3)
        b0, b1 = tl.where(walks, m0, b0), tl.where(walks, m1, b1)
        b2, b3 = tl.where(walks, m2, b2), tl.where(walks, m3, b3)
        fa, fb = tl.where(walks, nf, fa), tl.where(walks, mf, fb)
    place = corrections + words * key + correction
    position = _moved(z, drop) & (((z * 0 + 1) << step_bits) - 1)
    used, again = inside & (window <= last), inside & (window + 1 <= last)
    if WIDE:
        own, other = spread(fa), spread(fb)
        low = z.to(tl.uint64, bitcast=True) * 0
        high = low
        f0, f1, f2, f3 = _factors(position, coefficients + table, window, used)
        g0, g1, g2, g3 = _factors(position, coefficients + table, window + 1, again)
        for number in tl.static_range(4):
            one = f0 if number == 0 else f1 if number == 1 else f2 if number == 2 else f3
            two = g0 if number == 0 else g1 if number == 1 else g2 if number == 2 else g3
            p0, p1, r0, r1 = value(a0, a1, a2, a3, b0, b1, b2, b3, ciphers, number)
            low, high = _wide_cubic(low, high, p0, p1, own, place, number, one, inside)
            low, high = _wide_cubic(low, high, r0, r1, other, place, number, two, inside)
        nothing = low * 0
        less_low, less_high = minus(nothing, nothing, low, high)
        low = tl.where(party == 1, less_low, low)
        high = tl.where(party == 1, less_high, high)
        # Halves of the lower word are added up apart, so that no carry is lost.
        at = out + 3 * (columns * key + column)
        tl.atomic_add(at, (low & 0xFFFFFFFF).to(tl.int64, bitcast=True), mask=inside)
        tl.atomic_add(at + 1, (low >> 32).to(tl.int64, bitcast=True), mask=inside)
        tl.atomic_add(at + 2, high.to(tl.int64, bitcast=True), mask=inside)
    else:
        p0, p1, p2, p3, r0, r1, r2, r3 = rows_of(
            a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, ciphers, place, inside
        )
        total = cubic(p0, p1, p2, p3, position, coefficients + table, window, used)
        total += cubic(r0, r1, r2, r3, position, coefficients + table, window + 1, again)
        total = tl.where(party == 1, -total, total)
        tl.atomic_add(out + columns * key + column, total, mask=inside)


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
    device, wide = points.device, descent.width > 1
    nodes = descent.nodes(device)
    block, count = threads(1), len(nodes) * len(points)
    total = out
    if wide:
        total = torch.stack([out[..., 0] & _HALF, (out[..., 0] >> 32) & _HALF, out[..., 1]], -1)
    launch(
        _octave, triton.cdiv(count, block), points, roots, corrections, descent.factors(device),
        generator.planes(device), nodes, total, count, len(nodes), corrections.shape[1],
        out.shape[1], descent.top, descent.depth, descent.step_bits, party, WIDE=wide, BLOCK=block,
    )  # fmt: skip
    if wide:
        upper = total[..., 1] + (total[..., 0] >> 32)
        out[..., 0] = (total[..., 0] & _HALF) | (upper << 32)
        out[..., 1] = total[..., 2] + (upper >> 32)


# ------------------------------------------------------------------------------------ comparisons


@triton.jit
def parity_before(first, second, place):  # type: ignore[no-untyped-def]
    """The parity of the bits of a leaf of 128 before a place, which is below 128."""
    cut = ((place * 0 + 1) << (place & 63)) - 1
    low = tl.where(place < 64, first & cut, first)
    high = tl.where(place < 64, place * 0, second & cut)
    word = low ^ high
    word ^= word >> 32
    word ^= word >> 16
    word ^= word >> 8
    word ^= word >> 4
    word ^= word >> 2
    word ^= word >> 1
    return word & 1


@kernel
def _parities(  # type: ignore[no-untyped-def]
    roots, corrections, places, ciphers, out, count, each, words, depth, party,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first = 2 * (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    second = first + 1
    in_a, in_b = first < count, second < count
    key_a, key_b = first // each, second // each
    place_a = tl.load(places + first, mask=in_a, other=0)
    place_b = tl.load(places + second, mask=in_b, other=0)
    a0, a1, a2, a3 = root_of(roots, key_a, in_a)
    b0, b1, b2, b3 = root_of(roots, key_b, in_b)
    fa = mask_of(first * 0 + party)
    fb = fa
    zero = fa ^ fa
    ones = zero ^ 0xFFFFFFFF
    found_a, found_b = zero, zero
    for level in range(depth):
        turn_a = turn_of(place_a >> 7, depth, level)
        turn_b = turn_of(place_b >> 7, depth, level)
        # Where a path turns right, the left child's control bit counts as well.
        l0, l1, l2, l3, lf, m0, m1, m2, m3, mf = step(
            a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, zero, zero, ciphers, corrections,
            words * key_a + 2 * level, words * key_b + 2 * level, in_a, in_b,
        )  # fmt: skip
        found_a, found_b = found_a ^ (turn_a & lf), found_b ^ (turn_b & mf)
        r0, r1, r2, r3, rf, s0, s1, s2, s3, sf = step(
            a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, ones, ones, ciphers, corrections,
            words * key_a + 2 * level, words * key_b + 2 * level, in_a, in_b,
        )  # fmt: skip
        a0, a1 = l0 ^ (turn_a & (l0 ^ r0)), l1 ^ (turn_a & (l1 ^ r1))
        a2, a3 = l2 ^ (turn_a & (l2 ^ r2)), l3 ^ (turn_a & (l3 ^ r3))
        b0, b1 = m0 ^ (turn_b & (m0 ^ s0)), m1 ^ (turn_b & (m1 ^ s1))
        b2, b3 = m2 ^ (turn_b & (m2 ^ s2)), m3 ^ (turn_b & (m3 ^ s3))
        fa, fb = lf ^ (turn_a & (lf ^ rf)), mf ^ (turn_b & (mf ^ sf))
    p0, p1, r0, r1 = value(a0, a1, a2, a3, b0, b1, b2, b3, ciphers, 0)
    own, other = spread(fa), spread(fb)
    last_a, last_b = corrections + words * key_a, corrections + words * key_b
    p0 ^= own & tl.load(last_a + 2 * depth, mask=in_a, other=0)
    p1 ^= own & tl.load(last_a + 2 * depth + 1, mask=in_a, other=0)
    r0 ^= other & tl.load(last_b + 2 * depth, mask=in_b, other=0)
    r1 ^= other & tl.load(last_b + 2 * depth + 1, mask=in_b, other=0)
    bit_a = (spread(found_a) & 1) ^ parity_before(p0, p1, place_a & 127)
    bit_b = (spread(found_b) & 1) ^ parity_before(r0, r1, place_b & 127)
    tl.store(out + first, bit_a.to(tl.uint8), mask=in_a)
    tl.store(out + second, bit_b.to(tl.uint8), mask=in_b)


def parities(
    roots: torch.Tensor,
    corrections: torch.Tensor,
    places: torch.Tensor,
    depth: int,
    party: int,
    generator: Any,
) -> torch.Tensor:
    """XOR shares of [index < place]: uint8 [n, P] for places [n, P] (`dpf.parities`)."""
    device = places.device
    count, each = places.numel(), places.shape[1]
    out = torch.empty(places.shape, dtype=torch.uint8, device=device)
    block = threads(1)
    launch(
        _parities, triton.cdiv(count, 2 * block), roots, corrections, places,
        generator.planes(device), out, count, each, corrections.shape[1], depth, party, BLOCK=block,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------- histograms


@kernel
def _tally(  # type: ignore[no-untyped-def]
    roots, corrections, nodes, offsets, rows, ciphers, total, count, each, words, padded, top, cut,
    party, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Thread i has a leaf of path 2 i / leaves, and the next leaf or, of single leaves, path.
    leaf = 2 * (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    depth = top + cut
    path_a, path_b = leaf >> cut, (leaf + 1) >> cut
    in_a, in_b = path_a < count, path_b < count
    below = ((leaf * 0 + 1) << cut) - 1
    place_a = (tl.load(nodes + path_a, mask=in_a, other=0) << cut) | (leaf & below)
    place_b = (tl.load(nodes + path_b, mask=in_b, other=0) << cut) | ((leaf + 1) & below)
    key_a, key_b = path_a // each, path_b // each
    a0, a1, a2, a3 = root_of(roots, key_a, in_a)
    b0, b1, b2, b3 = root_of(roots, key_b, in_b)
    fa = mask_of(leaf * 0 + party)
    fb = fa
    for level in range(depth):
        a0, a1, a2, a3, fa, b0, b1, b2, b3, fb = step(
            a0, a1, a2, a3, fa, b0, b1, b2, b3, fb, turn_of(place_a, depth, level),
            turn_of(place_b, depth, level), ciphers, corrections, words * key_a + 2 * level,
            words * key_b + 2 * level, in_a, in_b,
        )  # fmt: skip
    p0, p1, r0, r1 = value(a0, a1, a2, a3, b0, b1, b2, b3, ciphers, 0)
    last_a = corrections + words * key_a + 2 * depth
    last_b = corrections + words * key_b + 2 * depth
    own, other = spread(fa), spread(fb)
    w0 = own & tl.load(last_a, mask=in_a, other=0)
    w1 = own & tl.load(last_a + 1, mask=in_a, other=0)
    v0 = other & tl.load(last_b, mask=in_b, other=0)
    v1 = other & tl.load(last_b + 1, mask=in_b, other=0)
    each_leaf = 128 // BITS
    row_a = tl.load(rows + key_a, mask=in_a, other=0)
    row_b = tl.load(rows + key_b, mask=in_b, other=0)
    to_a = total + padded * row_a + tl.load(offsets + path_a, mask=in_a, other=0)
    to_b = total + padded * row_b + tl.load(offsets + path_b, mask=in_b, other=0)
    to_a += (leaf & below) * each_leaf
    to_b += ((leaf + 1) & below) * each_leaf
    # Counters are added up in words of 32 bits, of which the lowest count.
    for k in tl.static_range(64 // BITS):
        ones = (1 << BITS) - 1
        at = k * BITS
        tl.atomic_add(to_a + k, (((p0 >> at) + (w0 >> at)) & ones).to(tl.int32), mask=in_a)
        tl.atomic_add(to_b + k, (((r0 >> at) + (v0 >> at)) & ones).to(tl.int32), mask=in_b)
        tl.atomic_add(
            to_a + each_leaf // 2 + k, (((p1 >> at) + (w1 >> at)) & ones).to(tl.int32), mask=in_a
        )
        tl.atomic_add(
            to_b + each_leaf // 2 + k, (((r1 >> at) + (v1 >> at)) & ones).to(tl.int32), mask=in_b
        )


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
    total = torch.zeros((count, job.padded), dtype=torch.int32, device=first.device)
    nodes, offsets = job.paths(first)
    depth, cut, paths = job.counters.depth, job.cut, nodes.numel()
    leaves = paths << cut
    block = threads(1)
    launch(
        _tally, triton.cdiv(leaves, 2 * block), roots, corrections, nodes, offsets, rows,
        generator.planes(first.device), total, paths, nodes.shape[1], corrections.shape[1],
        job.padded, depth - cut, cut, party, BITS=job.counters.bits, BLOCK=block,
    )  # fmt: skip
    return total.to(job.counters.kind)


# ------------------------------------------------------------------------------- the dealer's part


@triton.jit
def chosen(turn, one, other):  # type: ignore[no-untyped-def]
    """`one` where the mask is all ones, `other` where it is zero."""
    return other ^ (turn & (one ^ other))


@triton.jit
def added(word, one, other, flag, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What turns the client's value `one` and the server's `other` into `word`.

    Number by number of BITS bits in 64, negative where the server adds it; by XOR if BITS is 0.
    """
    if BITS == 0:
        found = word ^ one ^ other
    elif BITS == 64:
        found = word - one + other
        found = (found ^ flag) - flag
    else:
        found = word * 0
        for k in tl.static_range(64 // BITS):
            at = k * BITS
            part = (word >> at) - (one >> at) + (other >> at)
            part = ((part ^ flag) - flag) & ((1 << BITS) - 1)
            found |= part << at
    return found


@triton.jit
def _added_wide(  # type: ignore[no-untyped-def]
    low, high, one_low, one_high, other_low, other_high, flag
):
    """`added` of numbers of 128 bits in two words."""
    low, high = minus(
        low.to(tl.uint64, bitcast=True), high.to(tl.uint64, bitcast=True),
        one_low.to(tl.uint64, bitcast=True), one_high.to(tl.uint64, bitcast=True),
    )  # fmt: skip
    low, high = plus(
        low, high, other_low.to(tl.uint64, bitcast=True), other_high.to(tl.uint64, bitcast=True)
    )
    nothing = low * 0
    less_low, less_high = minus(nothing, nothing, low, high)
    negative = flag < 0
    return (
        tl.where(negative, less_low, low).to(tl.int64, bitcast=True),
        tl.where(negative, less_high, high).to(tl.int64, bitcast=True),
    )


@kernel
def _corrections(  # type: ignore[no-untyped-def]
    client, server, index, payloads, ends, ciphers, out, count, parts, words, depth, tables,
    BLOCKS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    key = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = key < count
    a0, a1, a2, a3 = root_of(client, key, inside)
    b0, b1, b2, b3 = root_of(server, key, inside)
    # The server's control bit; the client's is the opposite on the path.
    flag = mask_of(key * 0 + 1)
    ones = flag
    for level in range(depth + 1):
        for k in range(tables):
            if tl.load(ends + k) == level:
                for block in tl.static_range(BLOCKS):
                    p0, p1, r0, r1 = value(a0, a1, a2, a3, b0, b1, b2, b3, ciphers, block)
                    wanted = payloads + 2 * BLOCKS * (k * count + key) + 2 * block
                    target = out + words * key + 2 * depth + 2 * BLOCKS * k + 2 * block
                    w0 = tl.load(wanted, mask=inside, other=0)
                    w1 = tl.load(wanted + 1, mask=inside, other=0)
                    if BITS == 128:
                        w0, w1 = _added_wide(w0, w1, p0, p1, r0, r1, spread(flag))
                    else:
                        w0 = added(w0, p0, r0, spread(flag), BITS)
                        w1 = added(w1, p1, r1, spread(flag), BITS)
                    tl.store(target, w0, mask=inside)
                    tl.store(target + 1, w1, mask=inside)
        if level < depth:
            # An index has several words if it is longer than one.
            bit = depth - 1 - level
            place = tl.load(index + parts * key + bit // 64, mask=inside, other=0)
            turn = mask_of(place >> bit % 64)
            e0, e1, e2, e3, g0, g1, g2, g3 = encrypt(
                a0, a1, a2, a3, b0, b1, b2, b3, ciphers, ciphers, a0, 10, False
            )
            right = ciphers + ROUND_PLANES
            h0, h1, h2, h3, k0, k1, k2, k3 = encrypt(
                a0, a1, a2, a3, b0, b1, b2, b3, right, right, a0, 10, False
            )
            # The child off the path must become equal at both parties.
            c0 = chosen(turn, e0 ^ g0, h0 ^ k0) ^ a0 ^ b0
            c1 = chosen(turn, e1 ^ g1, h1 ^ k1) ^ a1 ^ b1
            c2 = chosen(turn, e2 ^ g2, h2 ^ k2) ^ a2 ^ b2
            c3 = chosen(turn, e3 ^ g3, h3 ^ k3) ^ a3 ^ b3
            # So must its control bit; those of the child on the path must differ.
            left = (e0 ^ g0 ^ a0 ^ b0 ^ turn ^ ones) & 1
            other = (h0 ^ k0 ^ a0 ^ b0 ^ ((turn & 1) << 1)) & 2
            c0 = (c0 & 0xFFFFFFFC) | left | other
            target = out + words * key + 2 * level
            tl.store(target, joined(c0, c1), mask=inside)
            tl.store(target + 1, joined(c2, c3), mask=inside)
            mine = flag ^ ones
            a0 = chosen(turn, h0, e0) ^ a0 ^ (mine & c0)
            a1 = chosen(turn, h1, e1) ^ a1 ^ (mine & c1)
            a2 = chosen(turn, h2, e2) ^ a2 ^ (mine & c2)
            a3 = chosen(turn, h3, e3) ^ a3 ^ (mine & c3)
            b0 = chosen(turn, k0, g0) ^ b0 ^ (flag & c0)
            b1 = chosen(turn, k1, g1) ^ b1 ^ (flag & c1)
            b2 = chosen(turn, k2, g2) ^ b2 ^ (flag & c2)
            b3 = chosen(turn, k3, g3) ^ b3 ^ (flag & c3)
            flag = mask_of(b0 >> (turn & 1))
            a0, b0 = a0 & 0xFFFFFFFC, b0 & 0xFFFFFFFC


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
    (tables, count, size), device = payloads.shape, index.device
    words = 2 * depth + tables * size
    out = torch.empty((count, words), dtype=torch.int64, device=device)
    places = integers(tuple(ends), device)
    parts = 1 if index.dim() == 1 else index.shape[1]
    block = threads(1)
    launch(
        _corrections, triton.cdiv(count, block), client, server, index,
        payloads, places, generator.planes(device), out, count, parts, words, depth, tables,
        BLOCKS=size // 2, BITS=bits, BLOCK=block,
    )  # fmt: skip
    return out
