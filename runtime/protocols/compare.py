"""Comparison with public thresholds, and maxima, by digit tables on an opened 32-bit window.

A window is 32 consecutive bits of a share. It is opened once under a 32-bit mask r, z = x + r, and
then serves any number of thresholds. x < t is the top bit of (z - t) - r, and that is looked up
digit by digit in tables that the dealer made of the bytes of r and shared bit by bit:

    top byte v   F(v) = top bit of v - r3      E(v) = [v = r3]      G(v) = [v - r3 = 128]
    byte j < 3   L_j(v) = [v < r_j]            Q_j(v) = [v = r_j]   (Q_0 is never needed)
    borrow     = L2 + Q2 (L1 + Q1 L0)
    [x < t]    = F + (E - G) borrow

as a borrow flips the top bit up at E and down at G. The eight looked-up bits are opened under eight
mask bits; the formula is multilinear in them, so its value is a public combination of products of
mask bits, which the dealer has shared as words. Two rounds in all, and the result is an arithmetic
share at once. Source: the digit-wise comparison of Garay, Schoenmakers and Villegas (PKC 2007) and
the one-time truth tables of Ishai et al. (TCC 2013), evaluated on one opening.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numba
import numpy as np
import torch

from runtime.context import Context
from runtime.messages import Protocol, Swap
from runtime.protocols.opening import open_under
from runtime.spec import CLIENT, Cost
from runtime.values import logical_shift

WINDOW_BITS = 32
_TABLE_BYTES = 32
_TABLES = 8
# Bit positions in the byte of looked-up bits.
_F, _E, _G, _L2, _Q2, _L1, _Q1, _L0 = range(_TABLES)
# (digit of the window, relation) of each table, in the order of the bits.
_LAYOUT = (
    (3, "top"),
    (3, "eq"),
    (3, "eq128"),
    (2, "lt"),
    (2, "eq"),
    (1, "lt"),
    (1, "eq"),
    (0, "lt"),
)

Polynomial = dict[frozenset[int], int]

LESS_THAN: Polynomial = {
    frozenset({_F}): 1,
    frozenset({_E, _L2}): 1,
    frozenset({_E, _Q2, _L1}): 1,
    frozenset({_E, _Q2, _Q1, _L0}): 1,
    frozenset({_G, _L2}): -1,
    frozenset({_G, _Q2, _L1}): -1,
    frozenset({_G, _Q2, _Q1, _L0}): -1,
}
"""[x < t] as a multilinear polynomial of the eight looked-up bits."""


def _subsets(items: frozenset[int]) -> list[frozenset[int]]:
    ordered = sorted(items)
    return [
        frozenset(c)
        for size in range(len(ordered) + 1)
        for c in itertools.combinations(ordered, size)
    ]


def _unmasking(polynomial: Polynomial) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables that turn bits opened under a mask byte into the polynomial's value.

    With bit_i = c_i + (1 - 2 c_i) rho_i the polynomial of the bits is one in the mask bits rho,
    whose coefficients depend on the opened byte c. Gives constants [256], coefficients [256, M],
    and the values of the M products of mask bits for each mask byte [256, M].
    """
    monomials = sorted(
        {s for term in polynomial for s in _subsets(term) if s},
        key=lambda s: (len(s), sorted(s)),
    )
    column = {monomial: index for index, monomial in enumerate(monomials)}
    constants = np.zeros(256, np.int64)
    coefficients = np.zeros((256, len(monomials)), np.int64)
    products = np.zeros((256, len(monomials)), np.uint8)
    for byte in range(256):
        bit = [(byte >> i) & 1 for i in range(_TABLES)]
        for term, factor in polynomial.items():
            for chosen in _subsets(term):
                weight = factor
                for i in term:
                    weight *= (1 - 2 * bit[i]) if i in chosen else bit[i]
                if chosen:
                    coefficients[byte, column[chosen]] += weight
                else:
                    constants[byte] += weight
        for monomial, index in column.items():
            products[byte, index] = all(bit[i] for i in monomial)
    return constants, coefficients, products


_CONSTANTS, _COEFFICIENTS, _PRODUCTS = _unmasking(LESS_THAN)
WORDS = _PRODUCTS.shape[1]
"""Dealt words per comparison."""


def _relation_rows(relation: str) -> np.ndarray:
    """For each mask byte r, the 256 bits of the relation to every v, packed: [256, 32]."""
    v, r = np.arange(256)[None, :], np.arange(256)[:, None]
    bits = {
        "lt": v < r,
        "eq": v == r,
        "eq128": (v - r) % 256 == 128,
        "top": (v - r) % 256 >= 128,
    }[relation]
    return np.packbits(bits, axis=1, bitorder="little")


_ROWS = {
    relation: torch.from_numpy(_relation_rows(relation))
    for relation in ("lt", "eq", "eq128", "top")
}


@dataclass
class Window:
    """32 bits of a share, opened once: z = x + r mod 2**32, with the tables of r's bytes.

    opened: int32 [n]. mask: int32 [n], this party's share of r; at the dealer r itself.
    tables: uint8 [n, 8, 32], XOR shares of the packed digit tables.
    """

    opened: torch.Tensor
    mask: torch.Tensor
    tables: torch.Tensor


def take_window(share: torch.Tensor, drop: int) -> torch.Tensor:
    """Shares modulo 2**32 of the bits [drop, drop + 32) of x, at most one unit too low.

    Local, and exact at the top: modulo 2**(64 - drop) the shares of x need no carry from above.
    """
    if share.is_meta:
        return torch.empty(share.shape, dtype=torch.int32, device="meta")
    return logical_shift(share, drop).to(torch.int32)


def open_window(ctx: Context, share: torch.Tensor) -> Protocol:
    """Open a 32-bit window, flattened to [n], for comparisons and interval tables.

    In: int32 share. Rounds 1, online 8 bytes, offline 256 bytes per element.
    Each party sees z = x + r; r is fresh and uniform modulo 2**32, the tables are XOR shares.
    """
    flat = share.reshape(-1)
    mask = ctx.mask(flat.shape, torch.int32)
    tables = ctx.deal_bits((len(flat), _TABLES, _TABLE_BYTES), lambda: _tables(mask))
    opened = yield from open_under(ctx, flat, mask)
    return Window(opened, mask, tables)


def open_window_cost(count: int) -> Cost:
    """Cost of `open_window` for `count` elements."""
    return Cost(rounds=1, online=8 * count, offline=_TABLES * _TABLE_BYTES * count)


def less_than(
    ctx: Context, window: Window, thresholds: list[int], dtype: torch.dtype = torch.int64
) -> Protocol:
    """Shares of [x < t] for public thresholds t, modulo 2**64 or 2**32: a tensor [T, n].

    Valid where x - t, as an integer, is in [-2**31, 2**31). Rounds 1, online 2 bytes, offline
    33 words per element and threshold. Each party sees the looked-up bits under fresh mask bits.
    """
    count = len(thresholds)
    shape = (count, *window.opened.shape)
    mask = ctx.mask_bits(shape)
    words = ctx.deal((*shape, WORDS), lambda: _products(mask), dtype)
    bits = yield from _open_bits(window, thresholds, mask)
    return _unmask(ctx, bits, words)


def less_than_cost(count: int, thresholds: int, word_bytes: int = 8) -> Cost:
    """Cost of `less_than` for `count` elements and that many thresholds."""
    pairs = count * thresholds
    return Cost(rounds=1, online=2 * pairs, offline=WORDS * word_bytes * pairs)


def relu_below(ctx: Context, window: Window) -> Protocol:
    """Shares modulo 2**32 of min(x, 0), flattened to [n], for x in [-2**31, 2**31).

    b x with b = [x < 0] and x = z - r is z b - b r, and b r is the same combination of dealt words
    that b is, each times r. Rounds 1, online 2 bytes, offline 2 * 33 * 4 bytes per element.
    Each party sees what it sees in `less_than`.
    """
    shape = (1, *window.opened.shape)
    bit_mask = ctx.mask_bits(shape)
    words = ctx.deal((*shape, WORDS), lambda: _products(bit_mask), torch.int32)
    scaled = ctx.deal(
        (*shape, WORDS),
        lambda: _products(bit_mask).to(torch.int32) * window.mask[None, :, None],
        torch.int32,
    )
    bits = yield from _open_bits(window, [0], bit_mask)
    if bits.is_meta:
        return window.opened
    flag = _unmask(ctx, bits, words)[0]
    constants = torch.from_numpy(_CONSTANTS).to(bits.device)[bits[0].long()].to(torch.int32)
    masked = _combination(bits, scaled)[0] + constants * window.mask
    return window.opened * flag - masked


def relu_below_cost(count: int) -> Cost:
    """Cost of `relu_below` for `count` elements."""
    return Cost(rounds=1, online=2 * count, offline=2 * WORDS * 4 * count)


def _tables(mask: torch.Tensor) -> torch.Tensor:
    digits = [((mask >> (8 * j)) & 0xFF).long() for j in range(4)]
    rows = {name: table.to(mask.device) for name, table in _ROWS.items()}
    return torch.stack([rows[relation][digits[digit]] for digit, relation in _LAYOUT], 1)


def _products(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(_PRODUCTS).to(mask.device)[mask.long()]


def _open_bits(window: Window, thresholds: list[int], mask: torch.Tensor) -> Protocol:
    """Look the digits of z - t up in the shared tables, and open the bits under `mask`."""
    if window.opened.is_meta:
        ghost = torch.empty(
            (len(thresholds), *window.opened.shape), dtype=torch.uint8, device="meta"
        )
        yield Swap(ghost)
        return ghost
    shifts = torch.tensor(thresholds, dtype=torch.int64, device=window.opened.device)
    points = (window.opened.long()[None, :] - shifts[:, None]) & 0xFFFFFFFF
    mine = _look_up(points, window.tables) ^ mask
    other = yield Swap(mine)
    return mine ^ other


def _look_up(points: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """The eight looked-up bits of each point [T, n], as a byte."""
    if not points.is_cuda:
        out = np.empty(points.shape, np.uint8)
        _look_up_cpu(points.numpy(), tables.numpy(), out)
        return torch.from_numpy(out)
    byte = torch.zeros(points.shape, dtype=torch.uint8, device=points.device)
    element = torch.arange(tables.shape[0], device=points.device)
    for position, (digit, _) in enumerate(_LAYOUT):
        v = (points >> (8 * digit)) & 0xFF
        packed = tables[element[None, :], position, v >> 3].long()
        byte |= (((packed >> (v & 7)) & 1) << position).to(torch.uint8)
    return byte


def _unmask(ctx: Context, bits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    if bits.is_meta:
        return torch.empty(bits.shape, dtype=words.dtype, device="meta")
    result = _combination(bits, words)
    if ctx.party == CLIENT:
        result += torch.from_numpy(_CONSTANTS).to(bits.device)[bits.long()].to(words.dtype)
    return result


def _combination(bits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """For each opened byte, its row of coefficients times the dealt words."""
    if not bits.is_cuda:
        out = np.empty(bits.shape, np.int64 if words.dtype is torch.int64 else np.int32)
        _combine_cpu(
            bits.numpy().reshape(-1),
            words.numpy().reshape(-1, WORDS),
            _COEFFICIENTS,
            out.reshape(-1),
        )
        return torch.from_numpy(out)
    coefficients = torch.from_numpy(_COEFFICIENTS).to(bits.device)[bits.long()].to(words.dtype)
    return (coefficients * words).sum(-1, dtype=words.dtype)


@numba.njit(cache=True, nogil=True)
def _look_up_cpu(points, tables, out):  # type: ignore[no-untyped-def]
    for t in range(points.shape[0]):
        for i in range(points.shape[1]):
            point = points[t, i]
            byte = 0
            for position in range(8):
                digit = 3 if position < 3 else (2 if position < 5 else (1 if position < 7 else 0))
                v = (point >> (8 * digit)) & 255
                byte |= ((tables[i, position, v >> 3] >> (v & 7)) & 1) << position
            out[t, i] = byte


@numba.njit(cache=True, nogil=True)
def _combine_cpu(bits, words, coefficients, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        row = bits[i]
        total = np.int64(0)
        for j in range(words.shape[1]):
            total += coefficients[row, j] * np.int64(words[i, j])
        out[i] = total


def maximum(ctx: Context, share: torch.Tensor, valid: torch.Tensor) -> Protocol:
    """Shares modulo 2**32 of the maximum of each row of x [R, L], by a tournament: [R].

    In: int32 share with differences inside [-2**31, 2**31); `valid`, public bool [R, L] with an
    entry in each row: the other entries are left out. Rounds 2 ceil(log2 L); per comparison online
    10 bytes and offline 520 bytes. Each party sees what it sees in `relu_below`.
    """
    for left, right, contested in _tournament(valid):
        count = int(contested.sum())
        width = left.shape[1]
        if share.is_meta:
            difference = torch.empty(count, dtype=torch.int32, device="meta")
        else:
            a, b = share[:, : 2 * width : 2], share[:, 1 : 2 * width : 2]
            where = contested.to(share.device)
            difference = (a - b)[where]
        if count:
            window = yield from open_window(ctx, difference)
            lower = yield from relu_below(ctx, window)
        if share.is_meta:
            continue
        winner = torch.where((right & ~left).to(share.device), b, a)
        if count:
            # max(a, b) = a - min(a - b, 0).
            winner[where] -= lower
        share = torch.cat([winner, share[:, 2 * width :]], 1)
    return share[:, 0]


def maximum_cost(valid: torch.Tensor) -> Cost:
    """Cost of `maximum` for rows with these valid entries."""
    total = Cost()
    for _, _, contested in _tournament(valid):
        count = int(contested.sum())
        if count:
            total += open_window_cost(count) + relu_below_cost(count)
    return total


def _tournament(valid: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each level: which left and right neighbours are valid, and where both are."""
    while valid.shape[1] > 1:
        width = valid.shape[1] // 2
        left, right = valid[:, : 2 * width : 2], valid[:, 1 : 2 * width : 2]
        yield left, right, left & right
        valid = torch.cat([left | right, valid[:, 2 * width :]], 1)
