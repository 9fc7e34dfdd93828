"""The logarithm of a number with hundreds of bits, with a single opening.

As in `octave`, V is opened as z = V + r, here modulo 2**(32 H), and each octave of V has a table of
cubics in the rows of a one-hot row that has *all* bits of r above the table's windows as its index.
So the key itself tests in which octave V lies. Numbers of hundreds of bits have as many octaves,
and of each the dealer would send both parties 16 bytes for the tree's level and 32 for a row's
words. Here four octaves share a table, of 240 windows that are as wide as the lowest of the four
takes. The levels between two tables have no words: 24 bytes for each octave instead of 48, for
about four times the work.

A table's windows are numbered from 16 to 255. Its nodes are the descendants of the 16 nodes whose
windows lie below the table above, 0 to 15, so that V is served by the highest table in which its
window is 16 or more, and by no other. That holds whatever the carries are between z and r: see
`octave`. The nodes that a party visits follow from z alone.

Sources: see `octave`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.correlations.dpf import (
    SEED_WORDS,
    WORD_BITS,
    Correct,
    Generator,
    HostKeys,
    children,
    key_words,
    sharing_prefixes,
    unsigned,
)
from mergec.runtime.kernels import planes
from mergec.runtime.kernels.aes import LANES, grow_level, values_of_leaves, vectors
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.long import HALF_BITS, ONES
from mergec.runtime.kernels.transfers import integers, to_device
from mergec.runtime.protocols.interval import fit_finely
from mergec.runtime.protocols.octave import sum_windows
from mergec.runtime.protocols.opening import open_long

_OCTAVES = 4
"""Octaves that share a table."""

_WINDOW_BITS = 4
_FIRST = 1 << _WINDOW_BITS
_END = _FIRST << _OCTAVES
"""Windows of a table: from 16 to 256. The last one serves only the highest table, where a carry
between z and r may put the largest V."""

_STEP_BITS = 13
"""A window has 2**13 units: V is read in units of 2**-17 of its table's first number. Finer ones
would need smaller coefficients than a word with `LongLog.frac` bits holds."""

_HEAD = _WINDOW_BITS + _OCTAVES + 1
"""Levels above the rows of the highest table."""

_WORDS = 4
_BLOCKS = 2
_LEAST = 0.9


@dataclass(frozen=True)
class LongLog:
    """log(V / 2**low) for V in [2**low, 2**(low + octaves)), with `frac` fractional bits.

    per_table: octaves that share a table. first, end: its windows. step_bits: a window has
    2**step_bits units. Raises ValueError if the lowest table's units would be below 1, or if
    coefficients would be too coarse.
    """

    low: int
    octaves: int
    frac: int

    per_table: ClassVar[int] = _OCTAVES
    first: ClassVar[int] = _FIRST
    end: ClassVar[int] = _END
    step_bits: ClassVar[int] = _STEP_BITS

    def __post_init__(self) -> None:
        if self.low < _WINDOW_BITS + _STEP_BITS or self.octaves < 1 or not 50 <= self.frac <= 58:
            raise ValueError(
                f"no logarithm has {self.frac} fractional bits on {self.octaves} octaves from "
                f"2**{self.low}"
            )

    @property
    def tables(self) -> int:
        """Number of tables."""
        return -(-self.octaves // _OCTAVES)

    @property
    def base(self) -> int:
        """Bits of V below the windows of the lowest table."""
        return self.low - _WINDOW_BITS

    @property
    def depth(self) -> int:
        """Levels of the tree."""
        return _OCTAVES * (self.tables - 1) + _HEAD

    @property
    def top(self) -> int:
        """Bits of V that count: one more than the largest has, so that no window comes again."""
        return self.base + self.depth

    @property
    def halves(self) -> int:
        """32-bit halves that hold `top` bits."""
        return -(-self.top // HALF_BITS)

    @property
    def ends(self) -> tuple[int, ...]:
        """Depth of the rows of each table, the lowest table first: that of the whole tree."""
        return tuple(self.depth - _OCTAVES * k for k in range(self.tables))

    @property
    def words(self) -> int:
        """Words of a key."""
        return key_words(self.depth, _WORDS * self.tables)

    def factors(self, device: torch.device) -> torch.Tensor:
        """The coefficients of a table's windows on a device, int64 [windows, 4]."""
        return _factors(self.frac, device)

    def starts(self, device: torch.device) -> torch.Tensor:
        """What each table's logarithms begin with on a device: int64 [tables]."""
        return integers(tuple(_offsets(self).tolist()), device)


@cache
def _coefficients(frac: int) -> np.ndarray:
    """Of the windows from 0 on, [windows, 4], for the logarithm of the window's number / 16."""
    return fit_finely(
        lambda w: np.log(np.maximum(w, _LEAST)),
        unit_bits=_WINDOW_BITS + _STEP_BITS,
        start=0,
        windows=_END + 1,
        step_bits=_STEP_BITS,
        out_frac=frac,
    ).coefficients


@cache
def _factors(frac: int, device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(_coefficients(frac)), device, "public")


@cache
def _offsets(spec: LongLog) -> np.ndarray:
    """What each table's logarithms begin with, modulo 2**64: int64 [tables]."""
    each, ring = _OCTAVES * math.log(2.0), 1 << WORD_BITS
    starts = [round(k * each * 2**32) << (spec.frac - 32) for k in range(spec.tables)]
    return np.array([start % ring for start in starts], np.uint64).view(np.int64)


def long_log(ctx: Context, share: torch.Tensor, spec: LongLog) -> Protocol:
    """Shares modulo 2**64 of log(V / 2**spec.low) with `spec.frac` fractional bits, int64 [n].

    In: shares of V modulo 2**(32 H), as 32-bit halves in int32 [n, H], with H >= `spec.halves`. A V
    just below 2**low returns about 0. Other V return another number. Error 2**-16.

    Rounds 1, online 8 H bytes per element. Offline, to each party, 16 bytes for each octave and 32
    for every four, with five octaves more of the first kind. Each party sees z modulo 2**(32 H),
    which is uniform as r is fresh and uniform, and a key of a point function, which is
    computationally indistinguishable from uniform, whatever r is. Which nodes a party visits
    depends on z alone.
    """
    mask = ctx.long_mask(*share.shape)
    opened = yield from open_long(ctx, share, mask)
    generator = ctx.point_functions(_BLOCKS)

    def correct(roots: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return _correct(mask, spec, generator)(roots)

    keys = ctx.deal_keys(len(share), spec.words, correct)
    if keys is None or opened.is_meta:
        return ghost((len(share),))
    found: torch.Tensor = _VALUES(opened, keys.roots, keys.corrections, spec, ctx.party, generator)
    return found


def long_log_cost(spec: LongLog, count: int, halves: int) -> Cost:
    """Cost of `long_log` for `count` elements of `halves` halves."""
    return Cost(rounds=1, online=8 * halves * count, offline=2 * 8 * spec.words * count)


def _correct(mask: torch.Tensor, spec: LongLog, generator: Generator) -> Correct:
    """Corrections of the keys for these masks, int32 halves [n, H]. Called by the dealer."""
    index, payloads = _ROWS(mask.contiguous(), spec)
    return sharing_prefixes(index, payloads, spec.ends, spec.depth, generator)


def _rows_host(mask: torch.Tensor, spec: LongLog) -> tuple[torch.Tensor, torch.Tensor]:
    """The row numbers of masks at the tree's leaves, int64 [n, words], and each table's words."""
    index = np.zeros((len(mask), -(-spec.depth // WORD_BITS)), np.uint64)
    payloads = np.empty((spec.tables, len(mask), _WORDS), np.int64)
    _write_rows(mask.numpy().view("uint32"), spec.base, spec.depth, index, payloads)
    return torch.from_numpy(index.view(np.int64)), torch.from_numpy(payloads)


def _rows_tensors(mask: torch.Tensor, spec: LongLog) -> tuple[torch.Tensor, torch.Tensor]:
    words = -(-spec.depth // WORD_BITS)
    parts = range(0, WORD_BITS * words, HALF_BITS)
    sizes = [min(HALF_BITS, max(0, spec.depth - part)) for part in parts]
    tables = range(0, _OCTAVES * spec.tables, _OCTAVES)
    drops = [spec.base + octave - _STEP_BITS for octave in tables]
    places = [spec.base + part for part in parts]
    found = _bits_of(mask, places + drops, sizes + [_STEP_BITS] * spec.tables)
    index, low = found[:, : len(places)], found[:, len(places) :].T
    payloads = torch.stack([torch.ones_like(low), low, low * low, low * low * low], -1)
    return index[:, ::2] | (index[:, 1::2] << HALF_BITS), payloads


def _bits_of(halves: torch.Tensor, places: list[int], counts: list[int]) -> torch.Tensor:
    """Up to 32 bits of long words [n, H], from each of the places on: int64 [n, places]."""
    begin, off, ones = (
        integers(tuple(numbers), halves.device)
        for numbers in (
            (place // HALF_BITS for place in places),
            (place % HALF_BITS for place in places),
            ((1 << count) - 1 for count in counts),
        )
    )
    words = F.pad(halves.long() & ONES, (0, 2))
    wide = words[:, begin] | (words[:, begin + 1] << HALF_BITS)
    return (wide >> off) & ones


def _values_host(
    opened: torch.Tensor,
    roots: torch.Tensor,
    corrections: torch.Tensor,
    spec: LongLog,
    party: int,
    generator: Generator,
) -> torch.Tensor:
    """A party's shares of the logarithms at the opened z, int32 halves [n, H]."""
    descend = descend_by_instructions if LANES else descend_by_library
    out = np.empty(len(opened), np.int64)
    keys = HostKeys(unsigned(roots), unsigned(corrections))
    descend(opened.contiguous().numpy().view("uint32"), keys, spec, party, generator, out)
    return torch.from_numpy(out)


_ROWS = Kernel("elements.rows_of_long", _rows_host, _rows_tensors, triton=False)
_VALUES = Kernel("logarithm.values", _values_host, planes.long_values)


def descend_by_instructions(
    points: np.ndarray,
    keys: HostKeys,
    spec: LongLog,
    party: int,
    generator: Generator,
    out: np.ndarray,
) -> None:
    """Write this party's shares of the logarithms at `points`, uint32 [n, H], to out [n]."""
    _descend(
        points, keys.roots, keys.corrections, party, generator.round_keys, spec.base, spec.depth,
        _coefficients(spec.frac), _offsets(spec), out,
    )  # fmt: skip


def descend_by_library(
    points: np.ndarray,
    keys: HostKeys,
    spec: LongLog,
    party: int,
    generator: Generator,
    out: np.ndarray,
) -> None:
    """Like `descend_by_instructions`, for processors without AES instructions."""
    for i in range(len(points)):
        key = HostKeys(keys.roots[i : i + 1], keys.corrections[i : i + 1])
        out[i] = _descend_one(points[i], key, spec, party, generator)


def _descend_one(
    point: np.ndarray, key: HostKeys, spec: LongLog, party: int, generator: Generator
) -> int:
    seeds = (key.roots & ~np.uint64(3))[:, None]
    bits, last, total = np.full((1, 1), party, np.uint8), 0, np.zeros(1, np.int64)
    for level in range(spec.depth):
        seeds, bits = children(np.ascontiguousarray(seeds), bits, key, level, generator)
        bit = int(_bits_at(point, spec.top - 1 - level, 1))
        if level + 1 < _HEAD:
            continue
        if level + 1 == _HEAD:
            first = int(_bits_at(point, spec.top - _HEAD, _HEAD)) - _END
            order, last = (first + np.arange(_END + 1)) % (1 << _HEAD), _END
            seeds, bits = seeds[:, order], bits[:, order]
        else:
            last = 2 * last + bit
        table, between = divmod(spec.depth - level - 1, _OCTAVES)
        if between:
            seeds, bits = seeds[:, : last + 1], bits[:, : last + 1]
            continue
        first = _FIRST if table else 0
        used = np.ascontiguousarray(seeds[:, : last - first + 1])
        words = SEED_WORDS * spec.depth + _WORDS * table
        rows = np.concatenate(list(generator.value(used) ^ used), axis=-1)[0]
        rows += bits[0, : len(rows), None] * key.corrections[0, words : words + _WORDS]
        drop = spec.base + _OCTAVES * table - _STEP_BITS
        _add_rows(
            rows, last, first, int(_bits_at(point, drop, _STEP_BITS)),
            _coefficients(spec.frac), int(_offsets(spec)[table]), total,
        )  # fmt: skip
        seeds, bits = (each[:, last - _FIRST + 1 : last + 1] for each in (seeds, bits))
        last = _FIRST - 1
    return int(-total[0] if party else total[0])


@compiled()
def _add_rows(rows, last, first, position, coefficients, offset, total):  # type: ignore[no-untyped-def]
    """Add the value from rows [N, 4] of windows from `last` down to `first`."""
    count = rows.shape[0]
    low, squares = np.empty(2 * count, np.uint64), np.empty(2 * count, np.uint64)
    for q in range(count):
        low[2 * q], low[2 * q + 1] = rows[q, 0], rows[q, 1]
        squares[2 * q], squares[2 * q + 1] = rows[q, 2], rows[q, 3]
        total[0] += offset * np.int64(rows[q, 0])
    total[0] += sum_windows(np.int64(position), last, first, low, squares, coefficients)


@compiled()
def _bits_at(halves, place, count):  # type: ignore[no-untyped-def]
    """Up to 31 bits of a long word, from `place` on; bits beyond its end are zero."""
    begin, off = place >> 5, np.uint64(place & 31)
    wide = np.uint64(0)
    if begin < halves.shape[0]:
        wide = np.uint64(halves[begin])
    if begin + 1 < halves.shape[0]:
        wide |= np.uint64(halves[begin + 1]) << np.uint64(32)
    return np.int64((wide >> off) & ((np.uint64(1) << np.uint64(count)) - np.uint64(1)))


@compiled()
def _write_rows(mask, base, depth, index, payloads):  # type: ignore[no-untyped-def]
    for i in range(mask.shape[0]):
        for place in range(0, depth, 16):
            bits = min(16, depth - place)
            part = np.uint64(_bits_at(mask[i], base + place, bits))
            index[i, place >> 6] |= part << np.uint64(place & 63)
        for k in range(payloads.shape[0]):
            low = _bits_at(mask[i], base + _OCTAVES * k - _STEP_BITS, _STEP_BITS)
            power = np.int64(1)
            for j in range(payloads.shape[2]):
                payloads[k, i, j] = power
                power *= low


@compiled()
def _descend(  # type: ignore[no-untyped-def]
    points, roots, corrections, party, round_keys, base, depth, coefficients, offsets, out
):
    lanes = (2 * _END + LANES - 1) // LANES
    seeds, flags = vectors(lanes), vectors(lanes)
    grown, controls = vectors(lanes), vectors(lanes)
    words = vectors(corrections.shape[1] // 2)
    rows = vectors(_BLOCKS * lanes).reshape(-1)
    low = np.empty(2 * lanes * LANES, np.uint64)
    squares = np.empty(2 * lanes * LANES, np.uint64)
    for i in range(points.shape[0]):
        for k in range(words.shape[0]):
            for lane in range(LANES):
                words[k, 2 * lane] = corrections[i, 2 * k]
                words[k, 2 * lane + 1] = corrections[i, 2 * k + 1]
        for half in range(2):
            seeds[0, half] = roots[i, half] & ~np.uint64(3)
            flags[0, half] = np.uint64(0) - np.uint64(party)
        nodes, last, total = 1, 0, np.int64(0)
        for level in range(depth):
            grow_level(round_keys, seeds, flags, words, level, (nodes + LANES - 1) // LANES)
            # The first of the children that stay, in the order of their rows, and how many.
            first, count = 0, 2 * nodes
            if level + 1 == _HEAD:
                last, count = _END, _END + 1
                first = _bits_at(points[i], base + depth - _HEAD, _HEAD) - _END
            elif level + 1 > _HEAD:
                last = 2 * last + _bits_at(points[i], base + depth - 1 - level, 1)
                count = last + 1
            for q in range(count):
                child = (first + q) & (2 * nodes - 1) if first else q
                vector = 2 * (child // 2 // LANES) + child % 2
                source, target = 2 * (child // 2 % LANES), 2 * (q % LANES)
                for half in range(2):
                    grown[q // LANES, target + half] = seeds[vector, source + half]
                    controls[q // LANES, target + half] = flags[vector, source + half]
            table, skipped = (depth - level - 1) // _OCTAVES, 0
            if level + 1 >= _HEAD and (depth - level - 1) % _OCTAVES == 0:
                bottom = _FIRST if table else 0
                used = last - bottom + 1
                groups = (used + LANES - 1) // LANES
                values = rows[: _BLOCKS * groups * 2 * LANES].reshape(_BLOCKS, LANES, groups, 2)
                values_of_leaves(
                    round_keys, grown, controls, words, depth + _BLOCKS * table, WORD_BITS, values
                )
                for q in range(used):
                    for half in range(2):
                        low[2 * q + half] = values[0, q % LANES, q // LANES, half]
                        squares[2 * q + half] = values[1, q % LANES, q // LANES, half]
                    total += offsets[table] * np.int64(low[2 * q])
                position = _bits_at(points[i], base + _OCTAVES * table - _STEP_BITS, _STEP_BITS)
                total += sum_windows(position, last, bottom, low, squares, coefficients)
                skipped, last = last - _FIRST + 1, _FIRST - 1
                count = _FIRST
            nodes = count
            for q in range(nodes):
                source, target = q + skipped, 2 * (q % LANES)
                for half in range(2):
                    vector, place = source // LANES, 2 * (source % LANES) + half
                    seeds[q // LANES, target + half] = grown[vector, place]
                    flags[q // LANES, target + half] = controls[vector, place]
        out[i] = -total if party else total
