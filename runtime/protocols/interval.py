"""Piecewise polynomials of a secret, evaluated on one opening with shared one-hot rows.

With z = x + r open, write z = zh 2**s + zl and r = rh 2**s + rl. Then x = i 2**s + u exactly, for
i = zh - rh and u = zl - rl in (-2**s, 2**s). The window i is at most one too high, and then u is
negative, which compensates. So each polynomial is fitted to its window and the one before it, and
the borrow between the two parts of z need not be known. The dealer shares the one-hot row of rh
times 1, rl, rl**2 and rl**3, as keys of a point function that each party expands. The value is then
a public linear combination of these shares, computed without a message. Source: lookups by one-time
truth tables (Ishai et al., TCC 2013) with the vector payload of FuseFSS (arXiv 2606.09551),
compressed by distributed point functions (`correlations.dpf`). The overlapping windows are ours
(docs/protocols.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.spec import Cost
from mergec.runtime.correlations.dpf import (
    BLOCK_WORDS,
    WORD_BITS,
    Generator,
    HostKeys,
    grow,
    key_words,
    sharing_words,
    unsigned,
)
from mergec.runtime.kernels import planes
from mergec.runtime.kernels.aes import LANES, grow_trees, values_of_leaves, vectors
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device

FINER_BITS = 2
"""Tables for exact rounding have windows of 2**-2 of the size."""

_DEGREE = 3
_WORDS = _DEGREE + 1
"""Words per row entry: one, and the first three powers of the low part of the mask."""

_BLOCKS = _WORDS // BLOCK_WORDS
_PIECE = 64
"""Elements expanded at once, so that their trees stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Table:
    """A function as cubic polynomials on equal windows.

    windows: number of windows, a power of two. step_bits: s; a window spans 2**s units of x.
    start: left end of the first window in units of x. drop: low bits of u that are ignored.
    coefficients: int64 [windows, 4], the polynomial in u >> drop. out_frac: fractional bits of
    the value. Valid for x in [start, start + span].
    """

    windows: int
    step_bits: int
    start: int
    drop: int
    out_frac: int
    coefficients: np.ndarray

    @property
    def span(self) -> int:
        """Length of the range in which values are right, in units of x."""
        return (self.windows - 1) << self.step_bits

    def factors(self, device: torch.device) -> torch.Tensor:
        """The coefficients on a device."""
        return _factors(self, device)


@cache
def _factors(table: Table, device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(table.coefficients), device, "public")


def fit(
    function: Callable[[np.ndarray], np.ndarray],
    unit_bits: int,
    start: int,
    windows: int,
    step_bits: int,
    out_frac: int,
    drop: int = 0,
) -> Table:
    """Fit least-squares cubics at Chebyshev nodes of each window and the one before it.

    function: takes and returns real numbers; one unit of x is 2**-unit_bits. Its values times
    2**out_frac must stay below 2**62.
    """
    nodes, values = _sampled(function, unit_bits, start, windows, step_bits)
    fitted = np.polynomial.polynomial.polyfit(nodes, values.T, _DEGREE).T
    powers = 2.0 ** (out_frac - (step_bits - drop) * np.arange(_DEGREE + 1))
    return Table(
        windows, step_bits, start, drop, out_frac, np.rint(fitted * powers).astype(np.int64)
    )


def fit_finely(
    function: Callable[[np.ndarray], np.ndarray],
    unit_bits: int,
    start: int,
    windows: int,
    step_bits: int,
    out_frac: int,
    drop: int = 0,
) -> Table:
    """Like `fit`, but the lower coefficients make up for the rounding of the higher ones.

    In small windows the cube's coefficient is a small integer, whose rounding would dominate.
    """
    nodes, values = _sampled(function, unit_bits, start, windows, step_bits)
    coefficients = np.empty((windows, _DEGREE + 1), np.int64)
    for degree in range(_DEGREE, -1, -1):
        unit = 2.0 ** ((step_bits - drop) * degree - out_frac)
        fitted = np.polynomial.polynomial.polyfit(nodes, values.T, degree)[degree]
        coefficients[:, degree] = np.rint(fitted / unit)
        values = values - coefficients[:, degree, None] * unit * nodes**degree
    return Table(windows, step_bits, start, drop, out_frac, coefficients)


def _sampled(
    function: Callable[[np.ndarray], np.ndarray],
    unit_bits: int,
    start: int,
    windows: int,
    step_bits: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev nodes in [-1, 1], and the function's values there in every window."""
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    scale = 2.0 ** (step_bits - unit_bits)
    centers = (start + np.arange(windows) * 2.0**step_bits) * 2.0**-unit_bits
    return nodes, function(centers[:, None] + nodes[None, :] * scale)


def evaluate(ctx: Context, opened: torch.Tensor, mask: torch.Tensor, table: Table) -> torch.Tensor:
    """Shares modulo 2**64 of f(x) with `table.out_frac` fractional bits, for x = opened - mask.

    In: opened, public [n], int32 or int64; mask of the same type, used only at the dealer, where it
    is r itself. Rounds 0, online 0 bytes; offline 64 bytes per element plus 32 for each bit of a
    window's index. Each party sees nothing new but its key of a point function, which is
    computationally indistinguishable from uniform, whatever r is.
    """
    count, depth = opened.numel(), _depth(table)
    generator = ctx.point_functions(_BLOCKS)
    keys = ctx.deal_keys(
        count,
        key_words(depth, _WORDS),
        lambda roots: sharing_words(*_row(mask, table), depth, generator)(roots),
    )
    if keys is None:
        return ghost((count,))
    points = opened.long() - table.start
    result: torch.Tensor = _VALUES(
        points, keys.roots, keys.corrections, table, ctx.party, generator
    )
    return result


def _values_host(
    points: torch.Tensor,
    roots: torch.Tensor,
    corrections: torch.Tensor,
    table: Table,
    party: int,
    generator: Generator,
) -> torch.Tensor:
    """A party's shares of the values at `points` [n], in units from the table's start."""
    out = np.empty(len(points), np.int64)
    keys = HostKeys(unsigned(roots), unsigned(corrections))
    expand = evaluate_by_instructions if LANES else evaluate_by_library
    expand(points.numpy(), keys, table, party, generator, out)
    return torch.from_numpy(out)


_VALUES = Kernel("trees.table_values", _values_host, planes.table_values)


def evaluate_cost(count: int, table: Table) -> Cost:
    """Cost of `evaluate` for `count` elements."""
    return Cost(offline=2 * 8 * key_words(_depth(table), _WORDS) * count)


def _depth(table: Table) -> int:
    return table.windows.bit_length() - 1


def _row(mask: torch.Tensor, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
    """Window index of each mask and the words stored there. Called by the dealer."""
    found: tuple[torch.Tensor, torch.Tensor] = _ROWS(
        mask.long().reshape(-1), table.windows, table.step_bits, table.drop
    )
    return found


def _rows_host(
    words: torch.Tensor, windows: int, step_bits: int, drop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    index, powers = np.empty(len(words), np.int64), np.empty((len(words), _WORDS), np.int64)
    _write_rows(words.numpy(), windows, step_bits, drop, index, powers)
    return torch.from_numpy(index), torch.from_numpy(powers)


def _rows_tensors(
    words: torch.Tensor, windows: int, step_bits: int, drop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    low = (words & ((1 << step_bits) - 1)) >> drop
    powers = torch.stack([torch.ones_like(low), low, low * low, low * low * low], -1)
    return (words >> step_bits) & (windows - 1), powers


_ROWS = Kernel("elements.row_of_powers", _rows_host, _rows_tensors, triton=False)


@compiled()
def _write_rows(words, windows, step_bits, drop, index, powers):  # type: ignore[no-untyped-def]
    ones = (np.int64(1) << step_bits) - 1
    for i in range(words.shape[0]):
        index[i] = (words[i] >> step_bits) & (windows - 1)
        low, power = (words[i] & ones) >> drop, np.int64(1)
        for k in range(powers.shape[1]):
            powers[i, k] = power
            power *= low


def evaluate_by_instructions(
    points: np.ndarray,
    keys: HostKeys,
    table: Table,
    party: int,
    generator: Generator,
    out: np.ndarray,
) -> None:
    """Write this party's shares of the values at `points` [n], in units from the table's start."""
    _evaluate_trees(
        points, keys.roots, keys.corrections, _depth(table), party, generator.round_keys,
        _planes(table), table.windows, table.step_bits, table.drop, out,
    )  # fmt: skip


def evaluate_by_library(
    points: np.ndarray,
    keys: HostKeys,
    table: Table,
    party: int,
    generator: Generator,
    out: np.ndarray,
) -> None:
    """Like `evaluate_by_instructions`, for processors without AES instructions."""
    for first in range(0, len(points), _PIECE):
        piece = slice(first, first + _PIECE)
        some = HostKeys(keys.roots[piece], keys.corrections[piece])
        seeds, bits = grow(some, _depth(table), party, generator)
        _evaluate_leaves(
            points[piece], seeds, bits, generator.value(seeds), some.corrections[:, -_WORDS:],
            party, _planes(table), table.windows, table.step_bits, table.drop, out[piece],
        )  # fmt: skip


@cache
def _planes(table: Table) -> np.ndarray:
    """Factors of a row's words, as polynomials in the position: [6, 4 * windows], two per window.

    The factors of window zh - j are read at j - zh + windows, so that they are in order. The first
    two words of a row (one and r), which alternate, have four coefficients; the other two (r**2 and
    r**3) have two.
    """
    order = (-np.arange(2 * table.windows)) % table.windows
    c = table.coefficients[order].T
    planes = np.zeros((6, c.shape[1], 2), np.int64)
    planes[:4, :, 0] = c
    planes[:3, :, 1] = -c[1], -2 * c[2], -3 * c[3]
    planes[4:, :, 0] = c[2], 3 * c[3]
    planes[4, :, 1] = -c[3]
    return planes.reshape(6, -1)


@compiled(inline="always")
def _sum_row(z, ones, squares, planes, windows, step_bits, drop):  # type: ignore[no-untyped-def]
    """The value at z from a share of the row: `ones` holds one and r, `squares` r**2 and r**3.

    The words of a window are adjacent.
    """
    a = (z & ((np.int64(1) << step_bits) - 1)) >> drop
    first = 2 * (windows - ((z >> step_bits) & (windows - 1)))
    # Slicing rows before the inner loop is what lets the compiler vectorize it.
    c0, c1, c2, c3, d0, d1 = (
        planes[0, first:], planes[1, first:], planes[2, first:], planes[3, first:],
        planes[4, first:], planes[5, first:],
    )  # fmt: skip
    total = np.int64(0)
    for m in range(2 * windows):
        low = c0[m] + a * (c1[m] + a * (c2[m] + a * c3[m]))
        total += np.int64(ones[m]) * low + np.int64(squares[m]) * (d0[m] + a * d1[m])
    return total


@compiled()
def _evaluate_trees(  # type: ignore[no-untyped-def]
    points, roots, corrections, depth, party, round_keys, planes, windows, step_bits, drop, out
):
    seeds, flags, words = vectors(windows), vectors(windows), vectors(depth + _BLOCKS)
    rows = vectors(_BLOCKS * windows).reshape(_BLOCKS, LANES, windows, 2)
    for start in range(0, points.shape[0], LANES):
        for lane in range(LANES):
            # Lanes without an element repeat the last element's tree.
            i = min(start + lane, points.shape[0] - 1)
            seeds[0, 2 * lane] = roots[i, 0] & ~np.uint64(3)
            seeds[0, 2 * lane + 1] = roots[i, 1] & ~np.uint64(3)
            for k in range(depth + _BLOCKS):
                words[k, 2 * lane] = corrections[i, 2 * k]
                words[k, 2 * lane + 1] = corrections[i, 2 * k + 1]
        flags[0] = np.uint64(0) - np.uint64(party)
        grow_trees(round_keys, seeds, flags, words, depth)
        values_of_leaves(round_keys, seeds, flags, words, depth, WORD_BITS, rows)
        for lane in range(min(LANES, points.shape[0] - start)):
            total = _sum_row(
                points[start + lane], rows[0, lane].reshape(-1), rows[1, lane].reshape(-1),
                planes, windows, step_bits, drop,
            )  # fmt: skip
            out[start + lane] = -total if party else total


@compiled()
def _evaluate_leaves(  # type: ignore[no-untyped-def]
    points, seeds, bits, blocks, last, party, planes, windows, step_bits, drop, out
):
    ones, squares = np.empty(2 * windows, np.uint64), np.empty(2 * windows, np.uint64)
    for i in range(points.shape[0]):
        for j in range(windows):
            chosen = np.uint64(0) - np.uint64(bits[i, j])
            for word in range(2):
                seed = seeds[i, j, word]
                ones[2 * j + word] = (blocks[0, i, j, word] ^ seed) + (chosen & last[i, word])
                squares[2 * j + word] = (blocks[1, i, j, word] ^ seed) + (
                    chosen & last[i, 2 + word]
                )
        total = _sum_row(points[i], ones, squares, planes, windows, step_bits, drop)
        out[i] = -total if party else total
