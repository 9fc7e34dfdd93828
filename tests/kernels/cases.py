"""Calls of every hot loop: at the ends of the ring, of odd and of no size, with masks of any kind.

Run as a program it compares the form for CUDA with the one for the CPU, word by word, and prints a
line for each kernel: under Triton's interpreter on this machine, or on a GPU with `--device cuda`.
It is a program because Triton decides when it is imported whether its interpreter runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergec.runtime.correlations.counters import Counters, Tally
from mergec.runtime.correlations.dpf import Generator
from mergec.runtime.kernels import bitsliced, matmul, turns
from mergec.runtime.kernels.backends import KERNELS, Kernel
from mergec.runtime.ops.glu import gated_table
from mergec.runtime.protocols import interval, octave, peak, slots, wide
from mergec.runtime.protocols.broad import Broad
from mergec.runtime.protocols.compare import DIGITS, LESS_THAN
from mergec.runtime.protocols.gated import Gated
from mergec.runtime.protocols.logarithm import LongLog
from mergec.runtime.protocols.normalize import _word_counts
from mergec.runtime.protocols.octave import Octaves
from mergec.runtime.protocols.pieces import Curve, Exponential, Pieces
from mergec.runtime.protocols.power import Mantissa
from mergec.runtime.protocols.ranks import Pairs
from mergec.runtime.protocols.saturate import Tail
from mergec.runtime.protocols.selection import Line, Selection
from mergec.runtime.protocols.truncate import truncation_parts
from mergec.runtime.protocols.waves import Waves

Arguments = tuple[Any, ...]
Cases = Callable[[bool], Iterator[Arguments]]
CASES: dict[str, Cases] = {}
"""By the kernel's name: its calls. With True also those that take long under the interpreter."""

_DRAW = torch.Generator().manual_seed(20)


def cases(name: str) -> Callable[[Cases], Cases]:
    """Register the calls of a kernel."""

    def register(make: Cases) -> Cases:
        CASES[name] = make
        return make

    return register


def words(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Uniform words; the first ones are at the ends of their ring."""
    info = torch.iinfo(dtype)
    low, high = max(info.min, -(2**63)), info.max
    found = torch.randint(low, high, shape, generator=_DRAW, dtype=dtype)
    edges = [info.min, info.max, 0, -1, 1, info.max // 2 + 1, info.min + 1]
    flat = found.view(-1)
    flat[: len(edges)] = torch.tensor(edges, dtype=dtype)[: flat.numel()]
    return found


def below(limit: int, *shape: int) -> torch.Tensor:
    """Numbers from 0 on, the first and the last one among them."""
    found = torch.randint(0, limit, shape, generator=_DRAW)
    flat = found.view(-1)
    flat[:2] = torch.tensor([0, limit - 1])[: flat.numel()]
    return found


def some_bits(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=_DRAW, dtype=torch.uint8)


# -------------------------------------------------------------------------- streams and products


@cases("cipher.stream")
def _(full: bool) -> Iterator[Arguments]:
    keys = torch.from_numpy(bitsliced.expand_key(bytes(range(32))).view(np.int32))
    yield keys, 0, 1
    yield keys, 2**32 - 2, 3  # The counter's lower word overflows.
    yield keys, 6, 0
    yield keys, 2**40, 200


def _extreme(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Weights whose limbs are all -128, or all 127, in some rows."""
    found = words(*shape, dtype=dtype)
    limbs = 4 if dtype is torch.int32 else 8
    offset = sum(128 << (8 * i) for i in range(limbs))
    least = (-offset + 2 ** (8 * limbs - 1)) % 2 ** (8 * limbs) - 2 ** (8 * limbs - 1)
    most = sum(127 << (8 * i) for i in range(limbs))
    if found.numel():
        found[..., :1] = least
        found[..., -1:, :] = most
    return found


assert matmul  # Its kernels are registered.


@cases("products.by_rows")
def _(full: bool) -> Iterator[Arguments]:
    yield words(1, 70), _extreme(torch.int32, 37, 70)
    yield words(2, 0), words(3, 0)
    yield words(0, 3), words(3, 3, dtype=torch.int32)
    yield words(2, 3), words(0, 3)
    yield _extreme(torch.int64, 5, 33), _extreme(torch.int64, 6, 33)
    for rows in (2, 5):
        yield _extreme(torch.int64, rows, 144), _extreme(torch.int32, 48, 144)
    # As many places as one sum of limbs holds, and more, all at the ends.
    yield torch.full((5, 2048), -(2**63)), torch.full((3, 2048), -(2**31), dtype=torch.int32)
    if full:
        for dtype in (torch.int32, torch.int64):
            for rows in (1, 3, 70):
                yield _extreme(torch.int64, rows, 300), _extreme(dtype, 65, 300)
        # Sizes as models have them, for which a GPU's kernels read several words at once.
        for rows in (1, 64):
            yield words(rows, 256), _extreme(torch.int32, 64, 256)


@cases("products.by_columns")
def _(full: bool) -> Iterator[Arguments]:
    yield words(1, 37), _extreme(torch.int32, 37, 70)
    yield _extreme(torch.int64, 5, 9), _extreme(torch.int32, 9, 4)
    for rows, inner, size in ((2, 0, 3), (0, 3, 2), (2, 3, 0), (5, 0, 3), (5, 3, 0)):
        yield words(rows, inner), words(inner, size)
    for rows in (1, 6):
        yield _extreme(torch.int64, rows, 48), _extreme(torch.int32, 48, 144)
    yield words(1, 20_000), words(20_000, 3, dtype=torch.int32)
    if full:
        yield words(3, 37), _extreme(torch.int64, 37, 130)
        yield words(17, 130), _extreme(torch.int32, 130, 70)
        for rows in (1, 64):
            yield words(rows, 128), _extreme(torch.int32, 128, 64)


@cases("products.batched")
def _(full: bool) -> Iterator[Arguments]:
    yield words(3, 1, 7), words(3, 7, 4)
    yield words(2, 2, 5), words(2, 4, 5).mT
    yield words(2, 1, 9), words(2, 12, 6)[:, 2:11]
    yield words(2, 6, 16), words(2, 32, 16).mT
    for count, rows, inner, size in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        yield words(count, rows, inner), words(count, inner, size)
        yield words(count, 3 * rows, inner), words(count, size, inner).mT
    if full:
        yield words(2, 6, 5), words(2, 12, 6)[:, 2:7]
        yield words(2, 9, 70), words(2, 66, 70).mT
        for rows in (1, 64):
            yield words(2, rows, 64), words(2, 32, 64).mT
            yield words(2, rows, 32), words(2, 32, 64)


# ------------------------------------------------------------------------------- point functions


def _generator(blocks: int) -> Generator:
    return Generator(blocks, bytes(range(16)))


@cases("trees.corrections")
def _(full: bool) -> Iterator[Arguments]:
    generator = _generator(2)
    some = (64, 2, 3), (0, 1, 1), (64, 2, 0), (8, 2, 0)
    for bits, depth, count in some + (((8, 3, 5), (16, 0, 2)) if full else ()):
        ends = (depth, depth // 2, 0) if full else (depth,)
        # A leaf of bits or of counters is one block, one of a row's words two.
        blocks = 2 if bits == 64 else 1
        payloads, index = words(len(ends), count, 2 * blocks), below(2**depth, count)
        roots = words(count, 2), words(count, 2)
        yield *roots, index, payloads, ends, depth, _generator(blocks), bits
    # An index may have more words than one.
    more = ((70, 2, 3), (130, 3, 1)) if full else ()
    for depth, parts, count in ((2, 2, 3), (2, 2, 0), *more):
        ends = (depth, 1)
        payloads, index = words(len(ends), count, 4), words(count, parts)
        yield words(count, 2), words(count, 2), index, payloads, ends, depth, generator, 64
    if full:
        index = below(2**7, 130)
        roots = words(130, 2), words(130, 2)
        yield *roots, index, words(1, 130, 4), (7,), 7, generator, 64
    # Numbers of two words, where the lower one may borrow from the upper.
    for count in (5, 0):
        payloads, index = torch.zeros(1, count, 4, dtype=torch.int64), below(4, count)
        yield words(count, 2), words(count, 2), index, payloads, (2,), 2, generator, 128


@cases("logarithm.values")
def _(full: bool) -> Iterator[Arguments]:
    few = ((LongLog(17, 5, 54), 0), (LongLog(30, 1, 57), 1))
    more = ((LongLog(40, 70, 57), 1), (LongLog(22, 93, 57), 0), (LongLog(17, 4, 50), 0))
    for spec, party in few + (more if full else ()):
        for count in (3, 0):
            opened = words(count, spec.halves + party, dtype=torch.int32)
            # With no and with all bits set, where rows wrap around at every level.
            opened[1:3] = torch.tensor([0, -1], dtype=torch.int32)[: max(0, count - 1), None]
            keys = words(count, 2), words(count, spec.words)
            yield opened, *keys, spec, party, _generator(2)


@cases("elements.rows_of_long")
def _(full: bool) -> Iterator[Arguments]:
    for spec in (LongLog(17, 5, 54), LongLog(40, 70, 57)):
        for count in (9, 0):
            yield words(count, spec.halves, dtype=torch.int32), spec


@cases("trees.parities")
def _(full: bool) -> Iterator[Arguments]:
    generator = _generator(1)
    for depth, party in ((1, 0), (0, 1), *(((3, 0), (3, 1)) if full else ())):
        size, count = 128 << depth, 3
        places = below(size, count, 5)
        places[0, :4] = torch.tensor([0, 63, 64, 127])
        corrections = words(count, 2 * depth + 2)
        yield words(count, 2), corrections, places, depth, party, generator
    yield words(0, 2), words(0, 4), below(256, 0, 5), 1, 0, generator
    yield words(3, 2), words(3, 4), below(256, 3, 0), 1, 1, generator


@cases("trees.tally")
def _(full: bool) -> Iterator[Arguments]:
    generator = _generator(1)
    few = ((Counters(8, 5), 2, 0), (Counters(16, 4), 16, 1))
    more = ((Counters(8, 9), 300, 1), (Counters(16, 7), 128, 0), (Counters(8, 8), 1, 1))
    for kind, width, party in few + (more if full else ()):
        job = Tally(kind, width)
        for count in (7, 0):
            first, rows = below(1 << kind.width, count), below(2, count)
            yield words(count, 2), words(count, kind.words), first, rows, job, 2, party, generator


@cases("trees.table_values")
def _(full: bool) -> Iterator[Arguments]:
    generator = _generator(2)
    few = ((8, 6, 0, 0, 3), (2, 9, 2, 1, 5), (8, 6, 0, 0, 0))
    more = ((128, 14, 0, 1, 9), (64, 14, 1, 0, 1))
    for windows, step, drop, party, count in few + (more if full else ()):
        table = interval.fit(np.sin, 8, -(4 << step), windows, step, 40, drop)
        corrections = words(count, 2 * (windows.bit_length() - 1) + 4)
        yield words(count), words(count, 2), corrections, table, party, generator


@cases("trees.octave_values")
def _(full: bool) -> Iterator[Arguments]:
    generator = _generator(2)
    spec = Octaves(2, 5, 2, Mantissa(-1.0, 1.0), 40)
    trees = [(spec, exact, party) for exact, party in ((False, 0), *(((True, 1),) if full else ()))]
    if full:
        trees.append((Octaves(20, 53, 4, Mantissa(-0.5, 1.5), 60), False, 1))
    for kind, exact, party in trees:
        for tree in octave._trees(kind, exact)[:2]:
            for count in (2, 0):
                out = torch.zeros((count, kind.columns, 1), dtype=torch.int64)
                keys = words(count, 2), words(count, tree.words)
                yield words(count), *keys, tree, party, generator, out
    for party in (0, 1) if full else (1,):
        (tree,) = octave._trees(spec, False, 2)
        for count in (2, 0):
            given = words(count), words(count, 2), words(count, tree.words), tree, party
            yield *given, _generator(4), words(count, spec.columns, 2)


@cases("elements.set_bits")
def _(full: bool) -> Iterator[Arguments]:
    yield (below(128 << 3, 300),)
    yield (torch.arange(130),)
    yield (below(128, 0),)


@cases("elements.single")
def _(full: bool) -> Iterator[Arguments]:
    yield below(1 << 9, 300), 8
    yield below(1 << 16, 300), 16
    yield below(1 << 9, 0), 8


@cases("elements.row_of_powers")
def _(full: bool) -> Iterator[Arguments]:
    yield words(70), 16, 9, 0
    yield words(70, dtype=torch.int32).long(), 128, 14, 2
    yield words(0), 16, 9, 0


@cases("elements.rows_of_octaves")
def _(full: bool) -> Iterator[Arguments]:
    for exact, width in ((False, 1), (True, 1), (False, 2)):
        for tree in octave._trees(Octaves(2, 5, 2, Mantissa(-1.0, 1.0), 40), exact, width)[:3]:
            yield words(9), tree
            yield words(0), tree


@cases("elements.half_places")
def _(full: bool) -> Iterator[Arguments]:
    yield words(2, 31), 18
    yield words(1, 1), 3
    yield words(2, 0), 18


@cases("elements.joined_halves")
def _(full: bool) -> Iterator[Arguments]:
    for flips in (False, True):
        for count in (31, 0):
            yield some_bits(count, 4) & 1, below(1 << 18, count, 4), flips


# ---------------------------------------------------------------------------------- element-wise


@cases("truncation.words")
def _(full: bool) -> Iterator[Arguments]:
    for shift in (0, 1, 16, 62):
        yield words(3, 33), shift
    yield words(31, dtype=torch.int32), 7
    yield words(0), 16
    yield words(0, dtype=torch.int32), 7


@cases("elements.truncated")
def _(full: bool) -> Iterator[Arguments]:
    for at_client in (False, True):
        for shift in (0, 1, 16, 62):
            yield words(3, 33), words(2, 3, 33), shift, at_client
        for shift in (0, 7, 30):
            yield words(31, dtype=torch.int32), words(2, 31), shift, at_client
    yield words(0, 4), words(2, 0, 4), 3, True


@cases("squares.words")
def _(full: bool) -> Iterator[Arguments]:
    for shift in (0, 1, 16, 62):
        yield words(3, 33), shift
    yield words(3, 0), 16


@cases("elements.squared")
def _(full: bool) -> Iterator[Arguments]:
    for at_client in (False, True):
        for shift in (0, 1, 16, 62):
            yield words(3, 33), words(4, 3, 33), shift, at_client
    yield words(3, 0), words(4, 3, 0), 16, True


@cases("formula.products")
def _(full: bool) -> Iterator[Arguments]:
    for dtype in (torch.int8, torch.int32, torch.int64):
        yield some_bits(31), words(31, 2), LESS_THAN, dtype
        yield some_bits(0), words(0, 2), LESS_THAN, dtype


@cases("elements.evaluated")
def _(full: bool) -> Iterator[Arguments]:
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        for count in (31, 0):
            dealt = words(2, count, 2, LESS_THAN.words, dtype=dtype)
            yield some_bits(2, count), dealt, LESS_THAN


@cases("digits.tables")
def _(full: bool) -> Iterator[Arguments]:
    yield words(31), DIGITS
    yield words(0), DIGITS
    for width in (4, 8, 12):
        yield words(31), slots._digits(width)


@cases("elements.looked_up")
def _(full: bool) -> Iterator[Arguments]:
    yield words(3, 31), some_bits(31, DIGITS.table_bytes), DIGITS._places
    yield words(31), some_bits(31, DIGITS.table_bytes), DIGITS._places
    yield words(3, 0), some_bits(0, DIGITS.table_bytes), DIGITS._places


SELECTIONS = [
    Selection(LESS_THAN, Line()),
    Selection(LESS_THAN, Line(30, 5, -(2**62))),
    Selection(LESS_THAN, Tail(0, 1.5).line(40)),
]


@cases("selection.words")
def _(full: bool) -> Iterator[Arguments]:
    for selection in SELECTIONS:
        for count in (31, 0):
            for times in (None, words(count)):
                yield some_bits(count), words(count, dtype=torch.int32), selection, times


@cases("elements.add_line")
def _(full: bool) -> Iterator[Arguments]:
    for selection in SELECTIONS:
        for count, crossed in ((31, False), (31, True), (0, False), (0, True)):
            parts = selection.line.parts * (1 + crossed)
            dealt = words(count, parts, selection.formula.words)
            opened = words(count, dtype=torch.int32)
            factors = words(count) if crossed else None
            yield words(count), some_bits(count), dealt, opened, selection, factors


SHIFTS = [[3, 5, 7], [-4, -2, 0, 2], [16, 16, 20, 20, 33, 62], [0], [1, 3]]


@cases("normalize.words")
def _(full: bool) -> Iterator[Arguments]:
    for shifts in SHIFTS:
        columns = len(shifts)
        for tops in (columns, 0):
            for rows, size in ((2, 9), (0, 9), (2, 0)):
                given = words(rows, size), words(rows, columns), words(rows, tops) & 1
                yield *given, np.array(shifts)


@cases("elements.scaled")
def _(full: bool) -> Iterator[Arguments]:
    for shifts in SHIFTS:
        for at_client, wraps in ((False, True), (True, True), (False, False), (True, False)):
            near, far, kind = _word_counts(np.array(shifts), wraps)
            columns = len(shifts)
            for rows, size in ((2, 9), (0, 9)):
                factor = [words(rows, columns if whole or wraps else 0) for whole in (1, 0, 1, 0)]
                dealt = words(rows, size, sum(near)), words(rows, size, far, dtype=kind)
                public = [words(rows, size) for _ in range(3)]
                yield *public, *factor, *dealt, np.array(shifts), at_client


@cases("saturate.points")
def _(full: bool) -> Iterator[Arguments]:
    yield words(31, dtype=torch.int32), -12345, 14, (1, 127)
    yield words(0, dtype=torch.int32), -12345, 14, (1, 127)


def _pairs(members: int = 5) -> Pairs:
    first, second = np.triu_indices(members, 1)
    return Pairs(first.astype(np.int32), second.astype(np.int32), members, 8)


@cases("ranks.differences")
def _(full: bool) -> Iterator[Arguments]:
    yield words(5, dtype=torch.int16), _pairs()
    yield words(5, dtype=torch.int32), _pairs()
    # One that is compared with none.
    yield words(1, dtype=torch.int32), _pairs(1)


@cases("ranks.one_hot")
def _(full: bool) -> Iterator[Arguments]:
    yield words(5, dtype=torch.int8), words(5, 3, dtype=torch.int16), 8
    yield words(5, dtype=torch.int8), words(5, 3, dtype=torch.int32), 8
    yield words(0, dtype=torch.int8), words(0, 3, dtype=torch.int32), 8


@cases("ranks.losses")
def _(full: bool) -> Iterator[Arguments]:
    for won in (0, 1):
        yield words(5, dtype=torch.int8), words(10, dtype=torch.int8), _pairs(), won
        yield words(1, dtype=torch.int8), words(0, dtype=torch.int8), _pairs(1), won


@cases("peak.winners")
def _(full: bool) -> Iterator[Arguments]:
    valid = torch.ones((2, 9), dtype=torch.bool)
    valid[1, 1:] = False
    for level in peak.entries_of(valid).levels(4):
        members, entries = len(level.members), level.pairs.entries
        short = {"dtype": torch.int16}
        yield (
            words(len(level.group), **short), words(members, **short),
            words(members, dtype=torch.int8), words(members, 2, entries, **short), level,
        )  # fmt: skip


# ------------------------------------------------------------------ tables sent to the server alone


class _AnyNumber(Curve):
    """No function: what packs and reads words asks only how many there are, and their sizes."""

    def __init__(self, terms: int) -> None:
        self._terms = terms

    @property
    def terms(self) -> int:
        return self._terms

    def magnitudes(self, pieces: Pieces) -> np.ndarray:
        return -np.arange(self._terms)

    def coefficients(self, pieces: Pieces, behind: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def basis(self, pieces: Pieces, low: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _table(*widths: int, step: int = 17, windows: int = 4, start: int = -(2**31)) -> Pieces:
    return Pieces(_AnyNumber(len(widths)), start, windows, step, widths, 4)


TABLES = [
    _table(4),
    _table(4, 5, 6, 7, 8, windows=16, start=2**31 - 5),
    _table(8, 8, 4, 4, 8, 5, 4, 6, step=1),
    _table(4, 4, 4, 4, 4, step=8, windows=16),
    _table(5, 4, 8, step=29, start=7),
    _table(5, 7, 4, 8, 4, step=32, windows=1),
    Pieces(Exponential(), -5, 8, 18, (6,), 8),
    Pieces(Exponential(), 2**20, 4, 3, (8,), 60),
]
"""All widths of words, a few and many windows, which begin anywhere and are of any size."""


@cases("pieces.parts")
def _(full: bool) -> Iterator[Arguments]:
    for pieces in TABLES:
        for start in (pieces.start, 0):
            yield words(31, dtype=torch.int32), start, pieces
    yield words(0, dtype=torch.int32), 0, TABLES[0]


@cases("turns.turned")
def _(full: bool) -> Iterator[Arguments]:
    for cycles, terms in ((1115, 40), (1, 2), (2**31 - 1, 26)):
        for count in (301, 1, 0):
            phases = torch.cat([below(1 << 32, count), words(count)])
            yield phases, cycles, below(turns.FRAC, terms).numpy() + 1
    # Every eighth of a turn and its neighbours, where quarters meet.
    yield (
        (torch.arange(8)[:, None] * 2**29 + torch.arange(-2, 3)).reshape(-1),
        1,
        np.full(4, turns.FRAC),
    )


@cases("pieces.powers")
def _(full: bool) -> Iterator[Arguments]:
    for pieces in TABLES[6:]:
        for count in (301, 0):
            yield below(1 << pieces.step_bits, count), pieces


@cases("pieces.exponentials")
def _(full: bool) -> Iterator[Arguments]:
    for pieces in TABLES[6:]:
        for count in (301, 0):
            yield below(1 << pieces.step_bits, count), pieces


@cases("pieces.values")
def _(full: bool) -> Iterator[Arguments]:
    for pieces in TABLES:
        for count in (31, 1, 0):
            yield (
                some_bits(count, pieces.dealt_bytes), below(pieces.windows, count),
                words(count, len(pieces.widths)), pieces, words(count),
            )  # fmt: skip


@cases("pieces.corrected")
def _(full: bool) -> Iterator[Arguments]:
    for pieces in TABLES:
        for count in (31, 1, 0):
            # Words of all sizes, at halves, and at the ends of what a double holds exactly.
            shape = count, pieces.windows, len(pieces.widths)
            found = words(*shape).double() / 2.0 ** (1 + below(62, *shape))
            edges = [0.5, -0.5, 2.0**52 + 1, -(2.0**52) - 1][: found.numel()]
            found.view(-1)[:4] = torch.tensor(edges, dtype=torch.float64)
            found = found / torch.from_numpy(pieces.scales)
            yield (
                some_bits(count, pieces.dealt_bytes), found, below(pieces.windows, count), pieces,
            )  # fmt: skip


@cases("slots.one_hot")
def _(full: bool) -> Iterator[Arguments]:
    for dtype in (torch.int8, torch.int16):
        for size in (64, 2):
            for count in (31, 0):
                yield words(count, size, dtype=dtype), words(count)


@cases("slots.tallied")
def _(full: bool) -> Iterator[Arguments]:
    for dtype in (torch.int8, torch.int16):
        for size, width in ((64, 32), (8, 8), (256, 1)):
            for count in (31, 0):
                rows = below(3, count)
                yield words(count, size, dtype=dtype), words(count), rows, (3, width)


BROAD = [Broad(reach, top, frac) for reach, top, frac in ((3, 1, 10), (7, 4, 17), (9, 5, 30))]


@cases("broad.corrected")
def _(full: bool) -> Iterator[Arguments]:
    for table in BROAD:
        for count in (31, 0):
            shape = count, table.dealt_bytes // 4
            yield words(*shape, dtype=torch.int32), words(count, dtype=torch.int32), table


@cases("broad.values")
def _(full: bool) -> Iterator[Arguments]:
    for table in BROAD:
        for count in (301, 0):
            dealt = words(count, table.dealt_bytes // 4, dtype=torch.int32)
            yield dealt, words(count, dtype=torch.int32), table, words(count)


@cases("broad.sums")
def _(full: bool) -> Iterator[Arguments]:
    for reach, top, frac, kept in ((3, 1, 10, 32), (7, 4, 17, 96), (8, 128, 22, 224)):
        table = Broad(reach, top, frac, kept)
        for count in (301, 0):
            dealt = words(count, table.dealt_bytes // 4, dtype=torch.int32)
            opened, rows = words(count, dtype=torch.int32), below(5, count)
            yield dealt, opened, rows, table, words(5, kept // 32, dtype=torch.int32)


def _gated() -> Iterator[Gated]:
    yield gated_table("silu", 48, 54)
    for frac, sizes in ((16, (0, 0, -9, -20, -30)), (30, (0, -1, -2)), (62, (8, 0, 0))):
        yield Gated(Waves(lambda x: np.cos(3 * x) / 4, 1, 2**13 + 1, sizes), frac)


@cases("gated.corrected")
def _(full: bool) -> Iterator[Arguments]:
    for table in _gated():
        for count in (31, 0):
            # Cosines and sines are 1 and -1 at most.
            turned = below((1 << 31) + 1, count, table.terms) - (1 << 30)
            masks = words(count, dtype=torch.int32 if table.narrow else torch.int64)
            share = below(256, count, table.row_bytes).to(torch.uint8)
            yield share, table.words(turned), truncation_parts(masks, table.shift), table


@cases("gated.values")
def _(full: bool) -> Iterator[Arguments]:
    for table in _gated():
        for count in (31, 0):
            dealt = below(256, count, table.row_bytes).to(torch.uint8)
            most = torch.from_numpy(1 << table.basis_bits)
            basis = below(1 << 62, count, table.terms) % (2 * most + 1) - most
            bits = table.factor_bits
            base = (words(count) >> (64 - bits)).to(torch.int64)
            wrap = below(2, count) << bits
            yield dealt, basis, base, wrap, table, words(count)


@cases("long.added")
def _(full: bool) -> Iterator[Arguments]:
    for count, halves in ((31, 1), (7, 3), (5, 24), (0, 4)):
        yield tuple(words(count, halves, dtype=torch.int32) for _ in range(2))
    ones = torch.full((2, 5), -1, dtype=torch.int32)
    yield ones, (torch.arange(5) == 0).to(torch.int32).expand(2, 5).contiguous()


def _wide_shifts() -> Iterator[np.ndarray]:
    yield from map(np.array, ([3, 5, 7], [10, 10, 12, 30], [1], [62, 62], [16, 16, 20, 20, 33, 62]))


@cases("wide.words")
def _(full: bool) -> Iterator[Arguments]:
    for shifts in _wide_shifts():
        for rows in (3, 0):
            shape = rows, len(shifts)
            yield words(rows, 7), below(1 << 42, *shape), below(2, *shape), shifts


@cases("wide.scaled")
def _(full: bool) -> Iterator[Arguments]:
    for shifts in _wide_shifts():
        columns = len(shifts)
        for rows, client in ((3, True), (3, False), (0, True)):
            shape = rows, columns
            yield (
                words(rows, 7), below(1 << 43, *shape) - (1 << 42), below(2, *shape) << 40,
                words(rows, 2, columns, 2), words(rows, 7, wide._words_of(shifts), 2), shifts,
                client,
            )  # fmt: skip


# ------------------------------------------------------------------------------------ comparison


_WORD = 8
"""Bytes. What streams and messages return begins at a multiple of this, wherever it may be."""


def _copied(value: Any, device: str, moved: bool) -> Any:
    """Tensors keep their strides, as kernels must take parts of larger ones.

    moved: they begin 8 bytes behind a multiple of 16.
    """
    if not isinstance(value, torch.Tensor):
        return value
    first = _WORD // value.element_size() if moved else 0
    steps = zip(value.shape, value.stride(), strict=True)
    size = 1 + sum((count - 1) * step for count, step in steps) if value.numel() else 0
    whole = torch.empty(first + size, dtype=value.dtype, device=device)
    return whole.as_strided(value.shape, value.stride(), first).copy_(value)


def _tensors(*values: Any) -> list[torch.Tensor]:
    flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
    return [each.cpu() for each in flat if isinstance(each, torch.Tensor)]


def differing(
    kernel: Kernel, form: Callable[..., Any], given: Arguments, device: str = "cpu", number: int = 0
) -> str | None:
    """What is wrong with a form's results, compared with the host's; None if they are equal.

    number: of the call, which says where its words begin: each second one at an odd place.
    """
    outcomes = []
    for function, place in ((kernel.host, "cpu"), (form, device)):
        arguments = tuple(
            _copied(value, place, bool(number >> i % 2 & 1)) for i, value in enumerate(given)
        )
        result = function(*arguments)
        outcomes.append(_tensors(result, *arguments))
    for number, (one, other) in enumerate(zip(*outcomes, strict=True)):
        if one.dtype is not other.dtype or one.shape != other.shape:
            made, wanted = (f"{each.dtype}{list(each.shape)}" for each in (other, one))
            return f"tensor {number} is {made}, not {wanted}"
        if not torch.equal(one, other):
            return f"tensor {number} differs in {int((one != other).sum())} of {one.numel()} words"
    return None


def _said(error: Exception) -> str:
    """An error in one line. That of a compiler has the cause at its end, below the code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^~")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'without a word'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu: Triton's interpreter")
    parser.add_argument("--full", action="store_true", help="also the calls that take long")
    parser.add_argument("--record", type=Path, help="write which kernels were launched, and how")
    parser.add_argument("--host", action="store_true", help="run the form for the CPU alone, twice")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=[*KERNELS], metavar="KERNEL")
    options = parser.parse_args()
    if options.device == "cpu" and not options.host:
        from tests.kernels import interpreter
    failed = 0
    for name in options.only:
        kernel, began, count = KERNELS[name], time.perf_counter(), 0
        try:
            form = kernel.by_triton if kernel.has_triton else kernel.reference
            if options.host:
                form = kernel.host
            for given in CASES[name](options.full):
                count += 1
                problem = differing(kernel, form, given, options.device, count)
                if problem:
                    failed += 1
                    print(f"{name}: call {count}: {problem}", flush=True)
        except Exception as error:  # noqa: BLE001  (one that does not compile is not the last one)
            failed += 1
            print(f"{name}: call {count}: {_said(error)}", flush=True)
            continue
        print(f"{name}: {count} calls, {time.perf_counter() - began:.1f} s", flush=True)
    if options.record:
        options.record.write_text(json.dumps(interpreter.RECORDED))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
