"""Comparison of a public number with a secret mask, digit by digit, with dealt tables.

For n-digit numbers v and r, the top bit of v - r modulo their full width follows from one-bit
relations between the digits v_j and r_j:

    top digit       F = top bit of v - r     E = [v = r]     G = [v - r = half]
    digits between  L_j = [v_j < r_j]        Q_j = [v_j = r_j]
    lowest digit    L_0
    borrow          L_{n-2} + Q_{n-2} (L_{n-3} + Q_{n-3} (... L_0))
    top bit of the whole = F + (E - G) borrow

because a borrow turns the top bit on where E holds and off where G holds. The dealer knows r. For
each relation it shares the table of the relation's value at every v, one bit per entry; the parties
look up their public v. Source: the digit-wise comparison of Garay, Schoenmakers and Villegas (PKC
2007) with the one-time truth tables of Ishai et al. (TCC 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, cached_property

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.formula import Polynomial

_NARROWEST, _WIDEST = 3, 12
"""Tables of narrower digits do not fill a byte; tables of wider ones would take too much memory."""


class Relations:
    """Relations between digits of numbers, cut into digits of these widths in bits, lowest first.

    widths: 3 to 12 each. layout: the digit and the name of each relation, at most eight; those of
    one digit stand together. bits: their number. table_bytes: size of all tables of one number.
    """

    def __init__(self, widths: Sequence[int], layout: Sequence[tuple[int, str]]) -> None:
        self.width = sum(widths)
        self.layout = layout
        self.bits = len(self.layout)
        starts = np.cumsum([0, *widths])
        rows = [2 ** widths[digit] // 8 for digit, _ in self.layout]
        self.table_bytes = sum(rows)
        # Shift, mask and first byte of each relation's table.
        self._places = np.array(
            [
                (starts[digit], 2 ** widths[digit] - 1, first)
                for (digit, _), first in zip(self.layout, np.cumsum([0, *rows]), strict=False)
            ],
            np.int64,
        )
        self._widths = widths

    def tables(self, mask: torch.Tensor) -> torch.Tensor:
        """The packed tables of each mask [n]: uint8 [n, table_bytes]. Called by the dealer."""
        tables: torch.Tensor = _TABLES(mask.long().reshape(-1), self)
        return tables

    @cached_property
    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """The tables of each digit, stored side by side, for each value of the digit.

        First, per digit: its shift, its mask, the first byte and the length of its tables, and
        their offset in the second result, which concatenates the tables of all digits, value by
        value.
        """
        places: list[tuple[int, ...]] = []
        blocks = np.empty(0, np.uint8)
        for digit in dict.fromkeys(digit for digit, _ in self.layout):
            index = [i for i, (other, _) in enumerate(self.layout) if other == digit]
            block = np.concatenate(
                [_rows(self.layout[i][1], self._widths[digit]) for i in index], axis=1
            )
            places.append((*self._places[index[0]], block.shape[1], len(blocks)))
            blocks = np.concatenate([blocks, block.reshape(-1)])
        return np.array(places, np.int64), blocks

    @property
    def dealt_bytes(self) -> int:
        """Bytes that the dealer sends to the server for one number."""
        return self.table_bytes

    def deal(self, ctx: Context, count: int, mask: Callable[[], torch.Tensor]) -> torch.Tensor:
        """XOR shares of the tables of the masks [count]; `mask` is called by the dealer only."""
        return ctx.deal_bits((count, self.table_bytes), lambda: self.tables(mask()))

    def look_up(self, points: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """Look up points [..., n] in tables [n, bytes]: the relations' bits, one byte per point."""
        if points.is_meta:
            return ghost(points.shape, dtype=torch.uint8)
        return look_up(points, tables, self._places)


class Digits(Relations):
    """Comparison of numbers cut into digits of the given widths in bits, lowest first.

    less: the top bit of v - r as a polynomial of the looked-up bits.
    """

    def __init__(self, *widths: int) -> None:
        top = len(widths) - 1
        layout = [(top, "top")]
        if top:
            layout += [(top, "equal"), (top, "half")]
        for digit in range(top - 1, -1, -1):
            layout += [(digit, "less"), (digit, "equal")] if digit else [(digit, "less")]
        super().__init__(widths, layout)
        self.less = self._less(top)

    @staticmethod
    def _less(top: int) -> Polynomial:
        terms: Polynomial = {frozenset({0}): 1}
        for first, sign in ((1, 1), (2, -1)) if top else ():
            # From the top digit down: a borrow starts here, or passes an equal digit from below.
            chain = {first}
            for step in range(top):
                terms[frozenset(chain | {3 + 2 * step})] = sign
                chain |= {4 + 2 * step}
        return terms


@cache
def _blocks(digits: Relations, device: torch.device) -> list[tuple[int, int, torch.Tensor]]:
    """Shift and mask of each digit, and its tables for every value of it, on a device."""
    places, blocks = digits.blocks
    found = []
    for shift, ones, _, length, offset in places.tolist():
        block = torch.from_numpy(blocks[offset : offset + (ones + 1) * length])
        found.append((shift, ones, to_device(block.reshape(-1, length), device, "public")))
    return found


def _tables_host(words: torch.Tensor, digits: Relations) -> torch.Tensor:
    out = torch.empty((len(words), digits.table_bytes), dtype=torch.uint8)
    _write_tables(words.numpy(), *digits.blocks, out.numpy())
    return out


def _tables_tensors(words: torch.Tensor, digits: Relations) -> torch.Tensor:
    return torch.cat(
        [block[(words >> shift) & ones] for shift, ones, block in _blocks(digits, words.device)],
        1,
    )


_TABLES = Kernel("digits.tables", _tables_host, _tables_tensors)


def look_up(points: torch.Tensor, tables: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    """Look up each point; bit i of a result is the entry of table i at the point's digit.

    points: int64 [..., n]. tables: packed bits, uint8 [n, bytes]. places: for each table i, the
    shift and mask of its digit and the first byte of the table. Returns uint8 [..., n].
    """
    bits: torch.Tensor = _LOOKED_UP(points, tables, places)
    return bits


def _looked_up_host(points: torch.Tensor, tables: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    out = torch.empty(points.shape, dtype=torch.uint8)
    shape = math.prod(points.shape[:-1]), len(tables)
    _look_up_cpu(
        points.contiguous().numpy().reshape(shape),
        tables.numpy(),
        places,
        out.numpy().reshape(shape),
    )
    return out


def _looked_up_tensors(
    points: torch.Tensor, tables: torch.Tensor, places: np.ndarray
) -> torch.Tensor:
    byte = torch.zeros(points.shape, dtype=torch.uint8, device=points.device)
    element = torch.arange(len(tables), device=points.device)
    for position, (shift, ones, first) in enumerate(places.tolist()):
        v = (points >> shift) & ones
        packed = tables[element, first + (v >> 3)].long()
        byte |= (((packed >> (v & 7)) & 1) << position).to(torch.uint8)
    return byte


_LOOKED_UP = Kernel("elements.looked_up", _looked_up_host, _looked_up_tensors)


@cache
def _rows(relation: str, width: int) -> np.ndarray:
    """For each digit r of a mask, the relation's bit for every v, packed."""
    if not _NARROWEST <= width <= _WIDEST:
        raise ValueError(f"a digit has {width} bits; it needs at least 3 bits and at most 12")
    size = 2**width
    # Small words: of 12 bits there are 2**24 pairs.
    v, r = np.arange(size, dtype=np.int16)[None, :], np.arange(size, dtype=np.int16)[:, None]
    if relation in ("less", "equal"):
        bits = v < r if relation == "less" else v == r
    else:
        left = (v - r) & np.int16(size - 1)
        bits = left == size // 2 if relation == "half" else left >= size // 2
    return np.packbits(bits, axis=1, bitorder="little")


@compiled()
def _write_tables(words, places, blocks, out):  # type: ignore[no-untyped-def]
    for i in range(words.shape[0]):
        row = out[i]
        for k in range(places.shape[0]):
            digit = (words[i] >> places[k, 0]) & places[k, 1]
            # Slicing rows before the inner loop is what lets the compiler vectorize it.
            source = blocks[places[k, 4] + digit * places[k, 3] :]
            target = row[places[k, 2] :]
            for b in range(places[k, 3]):
                target[b] = source[b]


@compiled()
def _look_up_cpu(points, tables, places, out):  # type: ignore[no-untyped-def]
    for t in range(points.shape[0]):
        for i in range(points.shape[1]):
            byte = 0
            for k in range(places.shape[0]):
                v = (points[t, i] >> places[k, 0]) & places[k, 1]
                byte |= ((tables[i, places[k, 2] + (v >> 3)] >> (v & 7)) & 1) << k
            out[t, i] = byte
