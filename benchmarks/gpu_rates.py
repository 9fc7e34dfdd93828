"""Throughput of every Triton kernel on a GPU, beside what the card allows: a part of `gpu_check`.

What moves words is compared with a copy, what encrypts with the stream of AES-256, and products of
many rows with torch's own product of int8. Each is measured here, on the same card.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_seen import Seen, brief

from mergec.runtime.correlations.counters import Counters, Tally
from mergec.runtime.correlations.dpf import Generator
from mergec.runtime.correlations.prg import DevicePrg
from mergec.runtime.kernels import bitsliced, turns
from mergec.runtime.kernels.backends import KERNELS
from mergec.runtime.ops.glu import gated_table
from mergec.runtime.ops.silu import SILU
from mergec.runtime.protocols import interval, octave, slots, wide
from mergec.runtime.protocols.broad import Broad
from mergec.runtime.protocols.compare import DIGITS, LESS_THAN
from mergec.runtime.protocols.logarithm import LongLog
from mergec.runtime.protocols.normalize import _word_counts
from mergec.runtime.protocols.octave import Octaves
from mergec.runtime.protocols.pieces import Pieces
from mergec.runtime.protocols.power import Mantissa
from mergec.runtime.protocols.selection import Line, Selection
from mergec.runtime.protocols.truncate import truncation_parts

assert slots  # Its kernels are registered.

SEED = bytes(range(32))
SECTOR = 32
"""Bytes that memory moves at once, where single words of a table are read."""

STREAM_ROUNDS, TREE_ROUNDS = 14, 10
"""Rounds of AES in a block of a stream, and of a tree."""


class Call(NamedTuple):
    """A call of a kernel, and what it does.

    what: its size, in words. given: its arguments. moved: bytes that it reads and writes at least.
    blocks: blocks of AES-128 that it encrypts. products: pairs of int8 that it multiplies and adds.
    """

    name: str
    what: str
    given: tuple[Any, ...]
    moved: int
    blocks: int = 0
    products: int = 0


@dataclass(frozen=True)
class Limits:
    """What the card does a second. copied: bytes, read and written. blocks: of the stream.

    products: pairs of int8; 0 if it could not be measured.
    """

    copied: float
    blocks: float = 0.0
    products: float = 0.0


class Draw:
    """Words on a device: their values are of no matter, as no kernel's time depends on them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = DevicePrg(SEED, device)

    def words(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self._stream.tensor(shape, dtype)

    def bytes(self, *shape: int) -> torch.Tensor:
        return self._stream.tensor(shape, torch.uint8)

    def below(self, limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(limit, shape, device=self.device)

    def ready(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


def nbytes(*given: Any) -> int:
    """Bytes of the tensors among arguments, each counted once."""
    return sum(each.nbytes for each in given if isinstance(each, torch.Tensor))


Make = Callable[[Draw, int], Iterator[Call]]
TABLE: dict[str, Make] = {}
"""By the kernel's name: its calls, of a size in 32-bit words that a card moves in a millisecond."""


def calls(name: str) -> Callable[[Make], Make]:
    """Register the calls of a kernel."""

    def register(make: Make) -> Make:
        TABLE[name] = make
        return make

    return register


# ------------------------------------------------------------------------------ streams, products


@calls("cipher.stream")
def _(draw: Draw, size: int) -> Iterator[Call]:
    keys = torch.from_numpy(bitsliced.expand_key(SEED).view(np.int32)).to(draw.device)
    pairs = max(1, size >> 5)
    yield Call("cipher.stream", f"{2 * pairs:,} blocks", (keys, 0, pairs), 32 * pairs)


def limb_products(limbs: int) -> int:
    """Pairs of limbs whose product counts modulo 2**64, of a word and one of so many limbs."""
    return sum(min(weight + 1, limbs) for weight in range(8))


def _product(name: str, a: torch.Tensor, b: torch.Tensor, rows: int, columns: int) -> Call:
    inner = a.shape[-1]
    batch = math.prod(a.shape[:-2])
    moved = nbytes(a, b) + 8 * batch * rows * columns
    kind = str(b.dtype).removeprefix("torch.")
    what = f"{rows} {'row' if rows == 1 else 'rows'} times {batch} x {inner:,} x {columns:,} {kind}"
    limbs = limb_products(5 if b.dtype is torch.int32 else 8)
    # Few rows are multiplied by words of 64 bits, and wait for memory.
    products = limbs * batch * rows * inner * columns if rows > 4 else 0
    return Call(name, what, (a, b), moved, products=products)


@calls("products.by_rows")
def _(draw: Draw, size: int) -> Iterator[Call]:
    inner = min(4096, size >> 4)
    weight = draw.words(max(1, (size >> 2) // inner), inner, dtype=torch.int32)
    for rows in (1, 64, 256):
        yield _product("products.by_rows", draw.words(rows, inner), weight, rows, len(weight))


@calls("products.by_columns")
def _(draw: Draw, size: int) -> Iterator[Call]:
    columns = min(1024, size >> 6)
    table = draw.words(max(1, (size >> 2) // columns), columns, dtype=torch.int32)
    for rows in (1, 64):
        yield _product("products.by_columns", draw.words(rows, len(table)), table, rows, columns)


@calls("products.batched")
def _(draw: Draw, size: int) -> Iterator[Call]:
    keys = draw.words(32, max(1, size >> 13), 64)
    for rows in (1, 64):
        yield _product(
            "products.batched", draw.words(32, rows, 64), keys.mT, rows, keys.shape[1]
        )  # fmt: skip


# ------------------------------------------------------------------------------- point functions


def _encrypts(name: str, count: int, what: str, given: tuple[Any, ...], blocks: int) -> Call:
    return Call(name, f"{count:,} {what}", given, nbytes(*given), blocks)


@calls("trees.corrections")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, depth, width = max(1, size >> 8), 7, 2
    given = (
        draw.words(count, 2), draw.words(count, 2), draw.below(1 << depth, count),
        draw.words(1, count, 2 * width), (depth,), depth, Generator(width), 64,
    )  # fmt: skip
    blocks = count * (4 * depth + 2 * width)
    yield _encrypts("trees.corrections", count, f"keys of {1 << depth} leaves", given, blocks)


@calls("trees.table_values")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, windows = max(1, size >> 12), 128
    table = interval.fit(np.sin, 16, 0, windows, 14, 57)
    depth = windows.bit_length() - 1
    given = (
        draw.words(count), draw.words(count, 2), draw.words(count, 2 * depth + 4), table, 0,
        Generator(2),
    )  # fmt: skip
    blocks = count * windows * (depth + 2)
    yield _encrypts("trees.table_values", count, f"trees of {windows} leaves", given, blocks)


@calls("trees.octave_values")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, spec = max(1, size >> 14), Octaves(20, 53, 4, Mantissa(-0.5, 1.5), 60)
    tree = octave._trees(spec, False)[0]
    given = (
        draw.words(count), draw.words(count, 2), draw.words(count, tree.words), tree, 0,
        Generator(2), draw.ready(count, spec.columns, 1),
    )  # fmt: skip
    blocks = count * len(tree.nodes(draw.device)) * 2 * (tree.depth + 2)
    yield _encrypts("trees.octave_values", count, f"trees of {tree.depth} levels", given, blocks)


@calls("trees.parities")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, each, depth = max(1, size >> 8), 4, 9
    given = (
        draw.words(count, 2), draw.words(count, 2 * depth + 2),
        draw.below(128 << depth, count, each), depth, 0, Generator(1),
    )  # fmt: skip
    blocks = count * each * (2 * depth + 1)
    yield _encrypts("trees.parities", count, f"keys, {each} places in each", given, blocks)


@calls("trees.tally")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, kind, width = max(1, size >> 14), Counters(8, 12), 1 << 12
    job, first = Tally(kind, width), draw.below(1 << 12, count)
    given = (
        draw.words(count, 2), draw.words(count, kind.words), first, draw.below(2, count), job, 2, 0,
        Generator(1),
    )  # fmt: skip
    leaves = job.paths(first)[0].numel() << job.cut
    blocks = leaves * (kind.depth + 1)
    yield _encrypts("trees.tally", count, f"tables of {width:,} counters", given, blocks)


@calls("logarithm.values")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, spec = max(1, size >> 14), LongLog(40, 70, 57)
    given = (
        draw.words(count, spec.halves, dtype=torch.int32), draw.words(count, 2),
        draw.words(count, spec.words), spec, 0, Generator(2),
    )  # fmt: skip
    stem = 2 * (spec.per_table * (spec.tables - 1) + 1)
    lines = spec.tables * ((spec.end - spec.first) // 2 + 1) + spec.first // 2
    blocks = count * (stem + lines * (2 * (spec.end.bit_length() - 1) + 4))
    yield _encrypts("logarithm.values", count, f"numbers of {spec.top} bits", given, blocks)


# ---------------------------------------------------------------------------------- element-wise


def _moves(name: str, count: int, given: tuple[Any, ...], moved: int, what: str = "words") -> Call:
    return Call(name, f"{count:,} {what}", given, moved)


@calls("elements.truncated")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count = size >> 4
    given = draw.words(count), draw.words(2, count), 16, True
    yield _moves("elements.truncated", count, given, nbytes(*given) + 8 * count)


@calls("elements.squared")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count = size >> 4
    given = draw.words(count), draw.words(4, count), 16, True
    yield _moves("elements.squared", count, given, nbytes(*given) + 8 * count)


@calls("elements.evaluated")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count = size >> 6
    given = draw.bytes(count), draw.words(count, 1, LESS_THAN.words), LESS_THAN
    yield _moves("elements.evaluated", count, given, nbytes(*given) + 8 * count)


@calls("digits.tables")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count = size >> 7
    moved = (8 + DIGITS.table_bytes) * count
    yield _moves("digits.tables", count, (draw.words(count), DIGITS), moved)


@calls("elements.looked_up")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count = size >> 7
    given = draw.words(count), draw.bytes(count, DIGITS.table_bytes), DIGITS._places
    read = min(DIGITS.table_bytes, SECTOR * len(DIGITS._places))
    yield _moves("elements.looked_up", count, given, (9 + read) * count)


@calls("elements.add_line")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, selection = size >> 6, Selection(LESS_THAN, Line(30, 5, -(2**62)))
    dealt = draw.words(count, selection.line.parts, selection.formula.words)
    opened = draw.words(count, dtype=torch.int32)
    given = draw.words(count), draw.bytes(count), dealt, opened, selection, None
    yield _moves("elements.add_line", count, given, nbytes(*given) + 8 * count)


SHIFTS = np.array([16, 16, 20, 20, 33, 62])


@calls("elements.scaled")
def _(draw: Draw, size: int) -> Iterator[Call]:
    rows, width, columns = max(1, size >> 15), 512, len(SHIFTS)
    near, far, kind = _word_counts(SHIFTS, True)
    factor = [draw.words(rows, columns) for _ in range(4)]
    dealt = draw.words(rows, width, sum(near)), draw.words(rows, width, far, dtype=kind)
    own = [draw.words(rows, width) for _ in range(3)]
    given = (*own, *factor, *dealt, SHIFTS, True)
    count = rows * width
    yield _moves("elements.scaled", count, given, nbytes(*given) + 8 * count)


@calls("normalize.words")
def _(draw: Draw, size: int) -> Iterator[Call]:
    rows, width, columns = max(1, size >> 15), 512, len(SHIFTS)
    given = (
        draw.words(rows, width), draw.words(rows, columns), draw.below(2, rows, columns), SHIFTS,
    )  # fmt: skip
    made, count = 8 * sum(_word_counts(SHIFTS, True)[0]), rows * width
    yield _moves("normalize.words", count, given, nbytes(*given) + made * count)


@calls("long.added")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, halves = size >> 6, 13
    given = tuple(draw.words(count, halves, dtype=torch.int32) for _ in range(2))
    what = f"words of {32 * halves} bits"
    yield _moves("long.added", count, given, nbytes(*given) + 4 * halves * count, what)


@calls("wide.words")
def _(draw: Draw, size: int) -> Iterator[Call]:
    rows, width, columns = max(1, size >> 15), 512, len(SHIFTS)
    given = (
        draw.words(rows, width), draw.below(1 << 42, rows, columns), draw.below(2, rows, columns),
        SHIFTS,
    )  # fmt: skip
    made = 16 * wide._words_of(SHIFTS)
    yield _moves("wide.words", rows * width, given, nbytes(*given) + made * rows * width)


@calls("wide.scaled")
def _(draw: Draw, size: int) -> Iterator[Call]:
    rows, width, columns = max(1, size >> 15), 512, len(SHIFTS)
    given = (
        draw.words(rows, width), draw.below(1 << 43, rows, columns),
        draw.below(2, rows, columns) << 40, draw.words(rows, 2, columns, 2),
        draw.words(rows, width, wide._words_of(SHIFTS), 2), SHIFTS, True,
    )  # fmt: skip
    count = rows * width
    yield _moves("wide.scaled", count, given, nbytes(*given) + 16 * count)


# ---------------------------------------------------------------------- tables for the server alone


@calls("turns.turned")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, terms = size >> 7, 26
    given = draw.below(1 << 32, count), 1115, np.full(terms, turns.FRAC)
    yield _moves("turns.turned", count, given, 8 * count * (1 + terms), f"phases, {terms} terms")


def _pieces() -> Pieces:
    pieces = SILU.from_server(9).table
    if not isinstance(pieces, Pieces):
        raise TypeError("the table of SiLU is of another kind")
    return pieces


@calls("pieces.values")
def _(draw: Draw, size: int) -> Iterator[Call]:
    pieces = _pieces()
    count, terms = max(1, (size >> 2) // pieces.dealt_bytes), len(pieces.widths)
    given = (
        draw.bytes(count, pieces.dealt_bytes), draw.below(pieces.windows, count),
        draw.words(count, terms), pieces, draw.words(count),
    )  # fmt: skip
    # An entry is in two places: the words' lower halves, and the bytes above them.
    moved = count * (16 + 8 * terms + 2 * SECTOR)
    yield _moves("pieces.values", count, given, moved, "tables")


@calls("pieces.corrected")
def _(draw: Draw, size: int) -> Iterator[Call]:
    pieces = _pieces()
    count, terms = max(1, (size >> 2) // pieces.dealt_bytes), len(pieces.widths)
    found = draw.ready(count, pieces.windows, terms, dtype=torch.float64)
    share = draw.bytes(count, pieces.dealt_bytes)
    given = share, found, draw.below(pieces.windows, count), pieces
    yield _moves("pieces.corrected", count, given, nbytes(*given, share), "tables")


@calls("slots.one_hot")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count = max(1, size >> 7)
    share = draw.words(count, 64, dtype=torch.int8)
    given = share, draw.words(count)
    yield _moves("slots.one_hot", count, given, nbytes(*given, share), "tables of 64")


@calls("slots.tallied")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count, rows, width = max(1, size >> 7), 64, 32
    given = (
        draw.words(count, 64, dtype=torch.int8), draw.words(count), draw.below(rows, count),
        (rows, width),
    )  # fmt: skip
    yield _moves("slots.tallied", count, given, nbytes(*given) - 32 * count, "tables of 64")


BROAD = Broad(7, 4, 17)


@calls("broad.corrected")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count = max(1, (size >> 1) // BROAD.dealt_bytes)
    share = draw.words(count, BROAD.dealt_bytes // 4, dtype=torch.int32)
    given = share, draw.words(count, dtype=torch.int32), BROAD
    yield _moves("broad.corrected", count, given, nbytes(*given, share), "tables")


@calls("broad.values")
def _(draw: Draw, size: int) -> Iterator[Call]:
    count = max(1, (size >> 1) // BROAD.dealt_bytes)
    given = (
        draw.words(count, BROAD.dealt_bytes // 4, dtype=torch.int32),
        draw.words(count, dtype=torch.int32), BROAD, draw.words(count),
    )  # fmt: skip
    moved = count * (12 + SECTOR * math.ceil(4 * BROAD.halves / SECTOR))
    yield _moves("broad.values", count, given, moved, "tables")


@calls("broad.sums")
def _(draw: Draw, size: int) -> Iterator[Call]:
    rows, kept = 64, 96
    table = Broad(7, 4, 17, kept)
    count = max(1, (size >> 1) // table.dealt_bytes)
    given = (
        draw.words(count, table.dealt_bytes // 4, dtype=torch.int32),
        draw.words(count, dtype=torch.int32), draw.below(rows, count), table,
        draw.words(rows, kept // 32, dtype=torch.int32),
    )  # fmt: skip
    moved = count * (12 + SECTOR * math.ceil(4 * table.halves / SECTOR))
    yield _moves("broad.sums", count, given, moved, "tables")


@calls("gated.corrected")
def _(draw: Draw, size: int) -> Iterator[Call]:
    table = gated_table("silu", 48, 54)
    count = max(1, (size >> 1) // table.row_bytes)
    share = draw.bytes(count, table.row_bytes)
    words = table.words(draw.below((1 << 31) + 1, count, table.terms) - (1 << 30))
    parts = truncation_parts(draw.words(count), table.shift)
    given = share, words, parts, table
    yield _moves("gated.corrected", count, given, nbytes(*given, share), "tables")


@calls("gated.values")
def _(draw: Draw, size: int) -> Iterator[Call]:
    table = gated_table("silu", 48, 54)
    count = max(1, (size >> 1) // table.row_bytes)
    basis = draw.below(1 << 20, count, table.terms)
    out = draw.words(count)
    base, wrap = draw.below(1 << table.factor_bits, count), draw.ready(count)
    given = draw.bytes(count, table.row_bytes), basis, base, wrap, table, out
    yield _moves("gated.values", count, given, nbytes(*given, out), "tables")


# ------------------------------------------------------------------------------------ measuring


TOGETHER = 4
"""Calls between two clocks, so that a device need not wait for the launch of each."""


def seconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Least time of a call, after one to compile it."""
    work()
    finish()
    least = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(TOGETHER):
            work()
        finish()
        least = min(least, (time.perf_counter() - began) / TOGETHER)
    return least


def finish() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def limits(device: torch.device, size: int) -> Iterator[Seen | Limits]:
    """What is measured of the card, and a line for each."""
    source = torch.empty(size, dtype=torch.int32, device=device)
    copied = 2 * source.nbytes / seconds(source.clone)
    del source
    yield Seen(f"a copy: {copied / 1e9:,.0f} GB/s read and written")
    (call,) = TABLE["cipher.stream"](Draw(device), size)
    taken = seconds(partial(KERNELS[call.name], *call.given), 5)
    blocks = call.moved / 16 / taken
    yield Seen(
        f"the stream of AES-256: {blocks / 1e9:.2f} G blocks/s, {call.moved / taken / 1e9:.1f} GB/s"
    )
    products = 0.0
    side = max(32, math.isqrt(size) // 16 * 8)
    try:
        a = torch.ones((side, side), dtype=torch.int8, device=device)
        # Tensor cores want the second factor by columns.
        taken = seconds(lambda: torch._int_mm(a, a.t()))
        products = side**3 / taken
        yield Seen(f"torch's product of int8: {2 * products / 1e12:,.2f} T operations/s")
    except Exception as error:  # noqa: BLE001  (kernels are measured all the same)
        yield Seen(f"torch's product of int8 failed: {brief(error)}", bad=True)
    yield Limits(copied, blocks, products)


def line(call: Call, taken: float, found: Limits) -> str:
    """What a call reached, and its limit."""
    said = f"{call.name}: {call.what}, {1e3 * taken:.3f} ms"
    if call.blocks:
        limit = found.blocks * STREAM_ROUNDS / TREE_ROUNDS
        return f"{said}, {_beside(call.blocks / taken / 1e9, limit / 1e9, 'G blocks/s')}"
    if call.products and found.products:
        reached, limit = (2 * each / 1e12 for each in (call.products / taken, found.products))
        return f"{said}, {_beside(reached, limit, 'T int8 operations/s')}"
    return f"{said}, {_beside(call.moved / taken / 1e9, found.copied / 1e9, 'GB/s')}"


def _beside(reached: float, limit: float, unit: str) -> str:
    return f"{reached:,.4g} {unit} (limit {limit:,.4g}: {100 * reached / limit:.0f}%)"


def rates_on(device: torch.device, size: int) -> Iterator[Seen]:
    """The limits of a device, and a line for each call of each Triton kernel."""
    found = Limits(1.0)
    for seen in limits(device, size):
        if isinstance(seen, Limits):
            found = seen
        else:
            yield seen
    yield Seen(
        "limits: a copy for what moves words; the stream's rounds for trees, whose blocks have 10 "
        "where the stream's have 14; torch's int8 for products of many rows"
    )
    for name, make in TABLE.items():
        try:
            for call in make(Draw(device), size):
                yield Seen(line(call, seconds(partial(KERNELS[call.name], *call.given), 5), found))
        except Exception as error:  # noqa: BLE001  (one that fails is not the last one)
            yield Seen(f"{name}: {brief(error)}", bad=True)
