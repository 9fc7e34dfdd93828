"""Piecewise polynomials of a secret, evaluated on one opening by shared one-hot rows.

With z = x + r open, write z = zh 2**s + zl and r = rh 2**s + rl. Then x = i 2**s + u exactly, for
i = zh - rh and u = zl - rl in (-2**s, 2**s): the window i is at most one too high, and u makes up
for it. So each polynomial is fitted to its window and the one before, and the borrow between the
two parts of z never needs to be known. The dealer shares the one-hot row of rh times 1, rl, rl**2
and rl**3; the value is then a public linear combination of these shares, without any message.
Source: lookups by one-time truth tables (Ishai et al., TCC 2013) with the vector payload of
FuseFSS (arXiv 2606.09551); the overlapping windows are ours (docs/protocols.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from runtime.context import INDICATOR_WORDS, Context
from runtime.kernels.compiled import compiled
from runtime.spec import Cost
from runtime.values import logical_shift

_DEGREE = 3
_CHUNK = 4096
"""Elements per piece: the dealt rows of a piece stay in a few tens of megabytes."""


@dataclass(frozen=True, eq=False)
class Table:
    """A function as cubic polynomials on equal windows.

    windows: their number, a power of two. step_bits: s, a window spans 2**s units of x.
    start: the first window's left end in units of x. drop: low bits of u that are left out.
    coefficients: int64 [windows, 4], the polynomial in u >> drop. out_frac: fractional bits of
    the value. Valid for x in [start, start + (windows - 1) * 2**s].
    """

    windows: int
    step_bits: int
    start: int
    drop: int
    out_frac: int
    coefficients: np.ndarray


def fit(
    function: Callable[[np.ndarray], np.ndarray],
    unit_bits: int,
    start: int,
    windows: int,
    step_bits: int,
    out_frac: int,
    drop: int = 0,
) -> Table:
    """Least-squares cubics at Chebyshev nodes of each window and the one before it.

    function: of real numbers; x units are 2**-unit_bits. Its values times 2**out_frac must stay
    below 2**62.
    """
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    scale = 2.0 ** (step_bits - unit_bits)
    centers = (start + np.arange(windows) * 2.0**step_bits) * 2.0**-unit_bits
    values = function(centers[:, None] + nodes[None, :] * scale)
    fitted = np.polynomial.polynomial.polyfit(nodes, values.T, _DEGREE).T
    powers = 2.0 ** (out_frac - (step_bits - drop) * np.arange(_DEGREE + 1))
    return Table(
        windows, step_bits, start, drop, out_frac, np.rint(fitted * powers).astype(np.int64)
    )


def evaluate(ctx: Context, opened: torch.Tensor, mask: torch.Tensor, table: Table) -> torch.Tensor:
    """Shares modulo 2**64 of f(x) with `table.out_frac` fractional bits, for x = opened - mask.

    In: opened public [n], int32 or int64; mask of the same type, used at the dealer only (where it
    is r itself). No rounds, no online bytes; offline 32 bytes per element and window.
    Neither party sees anything new: the rows are additive shares.
    """
    count = opened.numel()
    out = torch.empty(count, dtype=torch.int64, device=opened.device)
    for first in range(0, count, _CHUNK):
        piece = slice(first, min(first + _CHUNK, count))
        size = piece.stop - piece.start
        rows = ctx.deal_indicator(size, table.windows, lambda p=piece: _rows(mask[p], table))  # type: ignore[misc]
        if not rows.is_meta:
            out[piece] = _evaluate(opened[piece].long() - table.start, rows, table)
    return out


def evaluate_cost(count: int, table: Table) -> Cost:
    """Cost of `evaluate` for `count` elements."""
    return Cost(offline=8 * INDICATOR_WORDS * table.windows * count)


def _rows(mask: torch.Tensor, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
    words = mask.long()
    index = (words >> table.step_bits) & (table.windows - 1)
    low = (words & ((1 << table.step_bits) - 1)) >> table.drop
    return index, torch.stack([torch.ones_like(low), low, low * low, low * low * low], 1)


def _evaluate(points: torch.Tensor, rows: torch.Tensor, table: Table) -> torch.Tensor:
    if not points.is_cuda:
        out = np.empty(len(points), np.int64)
        _evaluate_cpu(
            points.numpy(), rows.numpy(), _unrolled(table), table.windows, table.step_bits,
            table.drop, out,
        )  # fmt: skip
        return torch.from_numpy(out)
    window = torch.arange(table.windows, device=points.device)
    index = (logical_shift(points, table.step_bits)[:, None] - window[None, :]) % table.windows
    c0, c1, c2, c3 = torch.from_numpy(table.coefficients).to(points.device)[index].unbind(-1)
    a = ((points & ((1 << table.step_bits) - 1)) >> table.drop)[:, None]
    values = rows[:, 0] * (c0 + a * (c1 + a * (c2 + a * c3)))
    values -= rows[:, 1] * (c1 + a * (2 * c2 + 3 * a * c3))
    values += rows[:, 2] * (c2 + 3 * a * c3)
    values -= rows[:, 3] * c3
    return values.sum(1)


@cache
def _unrolled(table: Table) -> np.ndarray:
    """Coefficients [4, 2 * windows] so that window zh - j is read at j - zh + windows, in order."""
    order = (-np.arange(2 * table.windows)) % table.windows
    return np.ascontiguousarray(table.coefficients[order].T)


@compiled()
def _evaluate_cpu(points, rows, c, windows, step_bits, drop, out):  # type: ignore[no-untyped-def]
    for i in range(points.shape[0]):
        z = points[i]
        a = (z & ((np.int64(1) << step_bits) - 1)) >> drop
        first = windows - ((z >> step_bits) & (windows - 1))
        total = np.int64(0)
        for j in range(windows):
            k = first + j
            c2a = c[2, k] + 3 * a * c[3, k]
            total += rows[i, 0, j] * (c[0, k] + a * (c[1, k] + a * (c[2, k] + a * c[3, k])))
            total -= rows[i, 1, j] * (c[1, k] + a * (c[2, k] + c2a))
            total += rows[i, 2, j] * c2a
            total -= rows[i, 3, j] * c[3, k]
        out[i] = total
