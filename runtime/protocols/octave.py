"""A function of a positive share over many octaves, with a single opening.

V is opened, as z = V + r. Each octave of V has a table of cubics (`interval`) on windows of the
size of its first number divided by 16. Window number i at octave k, for windows of 2**t, is

    i = (z >> t) - (r >> t),   which is V >> t or one more,

and octave k serves V if i is at least 16 and the octave above does not serve it. So there is a
table entry for each V, in the row r >> t of a one-hot row with *all* bits of r from t on. A party
that adds up its share of this row over the few rows (z >> t) - i whose windows belong to octave k
has a share of the value if k serves V, and a share of zero otherwise. No bit of V's octave is ever
compared or opened.

That octaves agree on who serves V costs nothing. The row (z >> t) - i also says what the window of
the octave above is, as its row number is the first bits of this one: it is c >> 1 for row number c.
Rows are nodes of one tree (`dpf.sharing_prefixes`), those of higher octaves nearer to the root. So
octave k is served by the children of the nodes whose windows lie below the octave above: 16 nodes
for each octave are kept and have 32 children, and of these the upper half is this octave's, and the
lower 16 are kept for the next. Exactly one octave serves each V in the range, whatever r is.

With exact rounding each octave rounds off other bits, so V is opened under a mask for each of them,
and the octaves' windows need not agree. Instead of a choice the function is then blended: f is the
sum over all octaves of f times a smooth bump that is zero outside of the octave and the next one.
All bumps together are 1 everywhere, and each product is tabulated.

Sources: lookups by one-time truth tables (Ishai et al., TCC 2013), incremental point functions
(Boneh et al., IEEE S&P 2021). Reading all octaves of a number from one tree is ours, and so is the
blending.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import HEADROOM_BITS, Cost
from mergec.runtime.core.values import logical_shift
from mergec.runtime.correlations.dpf import (
    BLOCK_WORDS,
    SEED_WORDS,
    WORD_BITS,
    Generator,
    HostKeys,
    added_wide,
    children,
    key_words,
    sharing_prefixes,
    unsigned,
)
from mergec.runtime.kernels import planes
from mergec.runtime.kernels.aes import (
    LANES,
    grow_level,
    values_of_leaves,
    vectors,
)
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import integers, to_device
from mergec.runtime.kernels.wide import plus, times
from mergec.runtime.protocols.interval import FINER_BITS, fit_finely
from mergec.runtime.protocols.opening import open_high

MAX_EXPONENT = 53
"""V must be below 2**54."""

_WINDOW_BITS = 4
"""An octave has 2**4 windows."""

_STEP_BITS = 14
"""A window has 2**14 units: V is read in units of 2**-18 of its octave's first number. With exact
rounding it is half of that, as cubics in smaller windows have smaller coefficients."""

_WORDS = 4
"""Numbers per row: one, and the first three powers of the low part of the mask."""

_PIECE = 64
"""Elements expanded at once, so that their trees stay in the processor's cache."""

_LEAST = 0.9
"""Where a column's function is used from. Its first window begins at 15/16."""

Curve = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Octaves:
    """A function of V in [2**low, 2**(high + 1)) as columns, one for every `span` octaves.

    curve: the function of V / 2**(low + span * column) in each column, monotone and hashable.
    Its values times 2**frac must stay below 2**62. finer: with exact rounding an octave has
    2**finer times as many windows, and the error is |curve| times 2**(-15 - finer). Raises
    ValueError if V or a value may be too large.
    """

    low: int
    high: int
    span: int
    curve: Curve
    frac: int
    finer: int = FINER_BITS

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= MAX_EXPONENT:
            raise ValueError(f"octaves {self.low} to {self.high} are outside 0 to {MAX_EXPONENT}")
        ends = self.curve(np.array([_LEAST, 2.0 ** min(self.span, self.count)]))
        if np.abs(ends).max() * 2.0**self.frac >= 2.0**HEADROOM_BITS:
            raise ValueError(f"values with {self.frac} fractional bits do not fit into a word")

    @property
    def count(self) -> int:
        """Number of octaves."""
        return self.high - self.low + 1

    @property
    def columns(self) -> int:
        """Number of columns."""
        return -(-self.count // self.span)

    def lift(self, exact: bool) -> int:
        """Number of bits by which V is shifted up, so that no octave's windows are below 1."""
        return max(0, self.window_bits(exact) - self.low)

    def window_bits(self, exact: bool) -> int:
        """An octave has 2**window_bits windows."""
        return _WINDOW_BITS + self.finer * exact


@cache
def _trees(spec: Octaves, exact: bool, width: int = 1) -> tuple[Descent, ...]:
    """One tree for all octaves; with exact rounding one for each."""
    every = range(spec.count)
    if exact:
        return tuple(_descent(spec, range(k, k + 1), exact, width) for k in every)
    return (_descent(spec, every, exact, width),)


def _descent(spec: Octaves, octaves: range, exact: bool, width: int) -> Descent:
    window_bits, bottom = spec.window_bits(exact), spec.low + spec.lift(exact)
    step_bits = _STEP_BITS - exact
    # One bit more than V has, so that the window after the last is not the first.
    top = spec.high + 2 + spec.lift(exact)
    kinds = [(k == 0, k == spec.count - 1) for k in octaves]
    tables = [
        _table(spec.curve, k % spec.span, kind, window_bits, exact, spec.frac)
        for k, kind in zip(octaves, kinds, strict=True)
    ]
    return Descent(
        top=top,
        windows=1 << window_bits,
        reach=_reach(exact, last=kinds[-1][1]),
        ends=tuple(top - (bottom + k - window_bits) for k in octaves),
        firsts=np.array([0 if first else 1 << window_bits for first, _ in kinds]),
        columns=np.array([k // spec.span for k in octaves]),
        drops=np.array([bottom + k - window_bits - step_bits for k in octaves]),
        step_bits=step_bits,
        coefficients=np.stack(tables),
        width=width,
    )


def _reach(exact: bool, last: bool) -> int:
    """Where an octave's windows end, in multiples of its beginning."""
    return 4 if exact and not last else 2


@dataclass(frozen=True, eq=False)
class Descent:
    """A tree and the nodes of it that are visited on the way down from z.

    top: bit of z after the highest that counts. windows: number of the first window of an octave.
    reach: the last octave's windows end at `windows` times this. ends: depth of each octave's rows;
    the first is that of the whole tree, and each is one less than the one before it. firsts: each
    octave's first window. columns, drops: each octave's column, and the bits by which V is shifted
    down to the units of its table. step_bits: a window spans 2**step_bits of these units.
    coefficients: int64 [octaves, windows, 4], of the cubics in these units, zero after the last
    window. width: 64-bit words of each number of a row, and of a share of the value: 1 or 2.
    """

    top: int
    windows: int
    reach: int
    ends: tuple[int, ...]
    firsts: np.ndarray
    columns: np.ndarray
    drops: np.ndarray
    step_bits: int
    coefficients: np.ndarray
    width: int

    @property
    def depth(self) -> int:
        """Levels of the tree."""
        return self.ends[0]

    @cached_property
    def kept(self) -> np.ndarray:
        """First and last window of the nodes that are expanded at each depth, [depth, 2].

        A node's window is z minus its row, both in the units of its depth; rows are modulo the
        number of rows, so near the root a row may have several windows. The parent of a node with
        window i has window i / 2, rounded up or down.
        """
        kept = np.zeros((self.depth, 2), np.int64)
        kept[:, 1] = self.windows - 1
        first = int(self.firsts[-1]) if len(self.ends) == 1 else 0
        last = self.windows * self.reach
        for depth in range(self.ends[-1] - 1, -1, -1):
            first, last = first // 2, -(-last // 2)
            kept[depth] = first, last
        return kept

    @cached_property
    def octave_at(self) -> np.ndarray:
        """The octave whose rows are the nodes of a depth, or -1: [depth + 1]."""
        found = np.full(self.depth + 1, -1)
        found[list(self.ends)] = np.arange(len(self.ends))
        return found

    @property
    def words(self) -> int:
        """Words of a key."""
        return key_words(self.depth, self.row_words * len(self.ends))

    @property
    def row_words(self) -> int:
        """Words of a row."""
        return _WORDS * self.width

    @property
    def blocks(self) -> int:
        """Blocks of the cipher that hold a row."""
        return self.row_words // BLOCK_WORDS

    def nodes(self, device: torch.device) -> torch.Tensor:
        """Which rows a point is looked up in, two in a line: int64 [pairs, 8], on a device.

        Depth of an octave's rows, the lower window, the octave's last window but for a bit of the
        point, column, drop, place of its coefficients and of its correction, and a zero.
        """
        return _nodes(self, device)

    def factors(self, device: torch.device) -> torch.Tensor:
        """The coefficients on a device."""
        return _factors(self, device)


@cache
def _nodes(descent: Descent, device: torch.device) -> torch.Tensor:
    lines = []
    for k, end in enumerate(descent.ends):
        first, last = int(descent.firsts[k]), 2 * int(descent.kept[end - 1, 1])
        place = SEED_WORDS * descent.depth + descent.row_words * k
        table = k * descent.coefficients.shape[1] * _WORDS
        lines += [
            (end, window, last, descent.columns[k], descent.drops[k], table, place, 0)
            for window in range(first, last + 2, 2)
        ]
    return to_device(torch.tensor(lines), device, "public")


@cache
def _factors(descent: Descent, device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(descent.coefficients), device, "public")


def _smooth(x: np.ndarray) -> np.ndarray:
    """From 0 up to 1 on [0, 1], with three derivatives that vanish at both ends."""
    x = np.clip(x, 0.0, 1.0)
    return x**4 * (35 - x * (84 - x * (70 - x * 20)))


@cache
def _table(
    curve: Curve, octave: int, kind: tuple[bool, bool], window_bits: int, exact: bool, frac: int
) -> np.ndarray:
    """Coefficients of an octave's windows from 0 on, [windows, 4]; zero after its last.

    octave: its place in the column. kind: whether it is the first and the last of all.
    """
    first, last = kind
    step_bits = _STEP_BITS - exact
    end = _reach(exact, last) << window_bits

    def function(w: np.ndarray) -> np.ndarray:
        value = curve(np.maximum(w, _LEAST) * 2.0**octave)
        if exact and not first:
            value = value * _smooth(w - 1)
        if exact and not last:
            value = value * (1 - _smooth(w / 2 - 1))
        return value

    table = fit_finely(
        function,
        unit_bits=window_bits + step_bits,
        start=0,
        # The children of kept nodes may be one window further.
        windows=end + 2,
        step_bits=step_bits,
        out_frac=frac,
    )
    table.coefficients[end + 1 :] = 0
    return table.coefficients


def columns(ctx: Context, share: torch.Tensor, spec: Octaves, wide: bool = False) -> Protocol:
    """Shares of the function of V, in the column of V and zero in all others: [n, spec.columns].

    In: additive share [n] of the integer V in [2**low, 2**(high + 1)). From 0 to 2**low the value
    is about that at 2**low. Other values return that of another number, or zero. Out: shares modulo
    2**64 with `spec.frac` fractional bits; the other columns are exactly zero. Relative error:
    that of the cubics, 2**-19 for reciprocals and 2**-20 for their roots, and a unit of V, 2**-18.

    With `wide` shares are modulo 2**128, as two words of 64 bits [n, spec.columns, 2], the lower
    one first, so that a party may drop bits of its own. Not for exact rounding.

    Rounds 1, online 16 bytes per element. Offline 64 bytes for each octave, 128 if wide, plus 32
    for each bit of the index in the tree, which has five bits more than there are octaves. Each
    party sees z, which is uniform as r is fresh and uniform, and a key of a point function, which
    is computationally indistinguishable from uniform, whatever r is. Which nodes a party visits
    depends on z alone.

    With exact rounding V is opened once for each octave, under a mask of its own, as each octave
    rounds off other bits (`open_high`): rounds 2. Each has a key of its own. Where two octaves
    share a number, both have a value, perhaps in two columns; the function is their sum.
    """
    count, width = len(share), 1 + wide
    lift, descents = spec.lift(ctx.exact), _trees(spec, ctx.exact, width)
    mask = ctx.mask((count, len(descents)))
    lifted = share << lift if lift and not share.is_meta else share
    hidden = [int(descent.drops[0]) for descent in descents] if ctx.exact else 0
    opened = yield from open_high(ctx, lifted[:, None].expand(mask.shape), mask, hidden)
    generator = ctx.point_functions(descents[0].blocks)
    size = (count, spec.columns, width)
    out = ghost(size) if share.is_meta else share.new_zeros(size)
    for k, descent in enumerate(descents):
        correct = partial(_correct, mask[:, k], descent, generator)
        keys = ctx.deal_keys(count, descent.words, correct)
        if keys is not None:
            points = opened[:, k].contiguous()
            _VALUES(points, keys.roots, keys.corrections, descent, ctx.party, generator, out)
    return out if wide else out[..., 0]


def _values_host(
    points: torch.Tensor,
    roots: torch.Tensor,
    corrections: torch.Tensor,
    descent: Descent,
    party: int,
    generator: Generator,
    out: torch.Tensor,
) -> None:
    """Add a party's shares of the values at `points` [n] to out [n, columns, width]."""
    descend = descend_by_instructions if LANES else descend_by_library
    keys = HostKeys(unsigned(roots), unsigned(corrections))
    descend(points.numpy(), keys, descent, party, generator, out.numpy())


_VALUES = Kernel("trees.octave_values", _values_host, planes.octave_values)


def columns_cost(spec: Octaves, count: int, wide: bool = False) -> Cost:
    """Cost of `columns` for `count` elements."""
    (descent,) = _trees(spec, exact=False, width=1 + wide)
    return Cost(rounds=1, online=16 * count, offline=2 * 8 * descent.words * count)


def _correct(
    mask: torch.Tensor,
    descent: Descent,
    generator: Generator,
    roots: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Corrections of the keys for these masks [n]. Called by the dealer."""
    index, payloads = _ROWS(mask.contiguous(), descent)
    bits = WORD_BITS * descent.width
    made = sharing_prefixes(index, payloads, descent.ends, descent.depth, generator, bits)
    return made(roots)


def _rows_host(mask: torch.Tensor, descent: Descent) -> tuple[torch.Tensor, torch.Tensor]:
    """The row numbers of masks at the tree's leaves, and the words of each octave's row."""
    index = np.empty(len(mask), np.int64)
    payloads = np.zeros((len(descent.ends), len(mask), _WORDS, descent.width), np.int64)
    depth, drops = descent.depth, descent.drops
    _write_rows(mask.numpy(), descent.top, depth, drops, descent.step_bits, index, payloads)
    return torch.from_numpy(index), torch.from_numpy(payloads).flatten(2)


def _rows_tensors(mask: torch.Tensor, descent: Descent) -> tuple[torch.Tensor, torch.Tensor]:
    drops = integers(tuple(descent.drops.tolist()), mask.device)[:, None]
    # The sign, of which a shift makes copies, is above what counts.
    moved = (mask << (-drops).clamp(min=0)) >> drops.clamp(min=0)
    low = moved & ((1 << descent.step_bits) - 1)
    index = logical_shift(mask, descent.top - descent.depth) & ((1 << descent.depth) - 1)
    payloads = torch.stack([torch.ones_like(low), low, low * low, low * low * low], -1)
    if descent.width > 1:
        payloads = torch.stack([payloads, torch.zeros_like(payloads)], -1).flatten(2)
    return index, payloads


_ROWS = Kernel("elements.rows_of_octaves", _rows_host, _rows_tensors, triton=False)


def descend_by_instructions(
    points: np.ndarray,
    keys: HostKeys,
    descent: Descent,
    party: int,
    generator: Generator,
    out: np.ndarray,
) -> None:
    """Add this party's shares of the values at `points` [n] to out [n, columns, width]."""
    _descend_trees(
        points, keys.roots, keys.corrections, party, generator.round_keys, descent.top,
        descent.depth, descent.kept, descent.octave_at, descent.firsts, descent.columns,
        descent.drops, descent.step_bits, descent.coefficients, descent.blocks, out,
    )  # fmt: skip


def descend_by_library(
    points: np.ndarray,
    keys: HostKeys,
    descent: Descent,
    party: int,
    generator: Generator,
    out: np.ndarray,
) -> None:
    """Like `descend_by_instructions`, for processors without AES instructions."""
    for first in range(0, len(points), _PIECE):
        piece = slice(first, first + _PIECE)
        some = HostKeys(keys.roots[piece], keys.corrections[piece])
        _descend_piece(points[piece], some, descent, party, generator, out[piece])


def _descend_piece(
    points: np.ndarray,
    keys: HostKeys,
    descent: Descent,
    party: int,
    generator: Generator,
    out: np.ndarray,
) -> None:
    count, kept = len(points), descent.kept
    every, firsts = np.arange(count)[:, None], descent.firsts
    nodes = kept[0, 1] - kept[0, 0] + 1
    seeds = np.repeat((keys.roots & ~np.uint64(3))[:, None], nodes, axis=1)
    bits = np.full((count, nodes), party, np.uint8)
    for depth in range(descent.depth):
        grown, controls = children(np.ascontiguousarray(seeds), bits, keys, depth, generator)
        bit = (points >> (descent.top - 1 - depth)) & 1
        last = 2 * kept[depth, 1]
        octave = descent.octave_at[depth + 1]
        if octave >= 0:
            used = last + 2 - firsts[octave]
            leaves = np.ascontiguousarray(grown[:, :used])
            words = SEED_WORDS * descent.depth + descent.row_words * octave
            correction = keys.corrections[:, None, words : words + descent.row_words]
            correction = controls[:, :used, None] * correction
            rows = np.concatenate(list(generator.value(leaves) ^ leaves), axis=-1)
            rows = rows + correction if descent.width == 1 else added_wide(rows, correction)
            _sum_rows(
                points, rows, last, firsts[octave], descent.columns[octave], descent.drops[octave],
                descent.step_bits, descent.coefficients[octave], party, out,
            )  # fmt: skip
        if depth + 1 < descent.depth:
            low, high = kept[depth + 1]
            places = (last - high + bit)[:, None] + np.arange(high - low + 1)
            seeds, bits = grown[every, places], controls[every, places]


@compiled(inline="always")
def _moved(word, drop):  # type: ignore[no-untyped-def]
    """A 64-bit word shifted down, or up if `drop` is negative."""
    unsigned = np.uint64(word)
    return np.int64(unsigned >> np.uint64(drop) if drop >= 0 else unsigned << np.uint64(-drop))


@compiled()
def _write_rows(mask, top, depth, drops, step_bits, index, payloads):  # type: ignore[no-untyped-def]
    ones = (np.int64(1) << step_bits) - 1
    rows = (np.int64(1) << depth) - 1
    for i in range(mask.shape[0]):
        index[i] = _moved(mask[i], top - depth) & rows
        for k in range(payloads.shape[0]):
            low, power = _moved(mask[i], drops[k]) & ones, np.int64(1)
            for j in range(payloads.shape[2]):
                payloads[k, i, j, 0] = power
                power *= low


@compiled(inline="always")
def sum_windows(a, last, first, low, squares, coefficients):  # type: ignore[no-untyped-def]
    """The value at position `a` of a window from shares of the rows of windows `last` to `first`.

    low: words 1 and r of each row, one after the other; squares: r**2 and r**3.
    """
    total = np.int64(0)
    for q in range(last - first + 1):
        row = coefficients[last - q]
        c0, c1, c2, c3 = row[0], row[1], row[2], row[3]
        total += np.int64(low[2 * q]) * (c0 + a * (c1 + a * (c2 + a * c3)))
        total -= np.int64(low[2 * q + 1]) * (c1 + a * (2 * c2 + 3 * a * c3))
        total += np.int64(squares[2 * q]) * (c2 + 3 * a * c3)
        total -= np.int64(squares[2 * q + 1]) * c3
    return total


@compiled(inline="always")
def _sum_wide_windows(a, last, first, rows, coefficients):  # type: ignore[no-untyped-def]
    """`sum_windows` of rows [N, 8] of numbers of 128 bits: both halves of the value."""
    low, high = np.uint64(0), np.uint64(0)
    for q in range(last - first + 1):
        row = coefficients[last - q]
        c0, c1, c2, c3 = row[0], row[1], row[2], row[3]
        factors = (
            c0 + a * (c1 + a * (c2 + a * c3)), -c1 - a * (2 * c2 + 3 * a * c3), c2 + 3 * a * c3,
            -c3,
        )  # fmt: skip
        for j in range(4):
            more_low, more_high = times(rows[q, 2 * j], rows[q, 2 * j + 1], factors[j])
            low, high = plus(low, high, more_low, more_high)
    return low, high


@compiled(inline="always")
def _add_wide(low, high, party, out):  # type: ignore[no-untyped-def]
    """Add a word of 128 bits to out [2]; the server subtracts it."""
    if party:
        low, high = times(low, high, np.int64(-1))
    low, high = plus(np.uint64(out[0]), np.uint64(out[1]), low, high)
    out[0], out[1] = np.int64(low), np.int64(high)


@compiled()
def _sum_rows(  # type: ignore[no-untyped-def]
    points, rows, last, first, column, drop, step_bits, coefficients, party, out
):
    """Add the values from rows [n, N, words] of windows from `last`, or one more, to `first`."""
    ones = (np.int64(1) << step_bits) - 1
    bit_place = drop + step_bits
    count = rows.shape[1]
    low, squares = np.empty(2 * count, np.uint64), np.empty(2 * count, np.uint64)
    for i in range(points.shape[0]):
        highest = last + ((points[i] >> bit_place) & 1)
        position = _moved(points[i], drop) & ones
        if out.shape[2] > 1:
            lower, upper = _sum_wide_windows(position, highest, first, rows[i], coefficients)
            _add_wide(lower, upper, party, out[i, column])
            continue
        for q in range(count):
            low[2 * q], low[2 * q + 1] = rows[i, q, 0], rows[i, q, 1]
            squares[2 * q], squares[2 * q + 1] = rows[i, q, 2], rows[i, q, 3]
        total = sum_windows(position, highest, first, low, squares, coefficients)
        out[i, column, 0] += -total if party else total


@compiled()
def _descend_trees(  # type: ignore[no-untyped-def]
    points, roots, corrections, party, round_keys, top, depth, kept, octave_at, firsts, columns,
    drops, step_bits, coefficients, blocks, out,
):  # fmt: skip
    ones = (np.int64(1) << step_bits) - 1
    most = 0
    for d in range(depth):
        most = max(most, kept[d, 1] - kept[d, 0] + 1)
    lanes = (most + LANES - 1) // LANES
    seeds, flags = vectors(2 * lanes), vectors(2 * lanes)
    grown, controls = vectors(2 * lanes), vectors(2 * lanes)
    words = vectors(corrections.shape[1] // 2)
    rows = vectors(blocks * 2 * lanes).reshape(-1)
    low = np.empty(4 * lanes * LANES, np.uint64)
    squares = np.empty(4 * lanes * LANES, np.uint64)
    wide = np.empty((2 * lanes * LANES, 2 * blocks), np.uint64)
    for i in range(points.shape[0]):
        for k in range(words.shape[0]):
            for lane in range(LANES):
                words[k, 2 * lane] = corrections[i, 2 * k]
                words[k, 2 * lane + 1] = corrections[i, 2 * k + 1]
        for half in range(2):
            root = roots[i, half] & ~np.uint64(3)
            for node in range(kept[0, 1] - kept[0, 0] + 1):
                seeds[node // LANES, 2 * (node % LANES) + half] = root
                flags[node // LANES, 2 * (node % LANES) + half] = np.uint64(0) - np.uint64(party)
        for d in range(depth):
            nodes = kept[d, 1] - kept[d, 0] + 1
            grow_level(round_keys, seeds, flags, words, d, (nodes + LANES - 1) // LANES)
            # Children in the order of their rows, which is descending by window.
            for child in range(2 * nodes):
                vector = 2 * (child // 2 // LANES) + child % 2
                source, target = 2 * (child // 2 % LANES), 2 * (child % LANES)
                for half in range(2):
                    grown[child // LANES, target + half] = seeds[vector, source + half]
                    controls[child // LANES, target + half] = flags[vector, source + half]
            last = 2 * kept[d, 1] + ((points[i] >> (top - 1 - d)) & 1)
            k = octave_at[d + 1]
            if k >= 0:
                used = last - firsts[k] + 1
                count = (used + LANES - 1) // LANES
                values = rows[: blocks * count * 2 * LANES].reshape(blocks, LANES, count, 2)
                values_of_leaves(
                    round_keys, grown, controls, words, depth + blocks * k,
                    WORD_BITS * out.shape[2], values,
                )  # fmt: skip
                position = _moved(points[i], drops[k]) & ones
                if out.shape[2] > 1:
                    for q in range(used):
                        for word in range(2 * blocks):
                            wide[q, word] = values[word // 2, q % LANES, q // LANES, word % 2]
                    lower, upper = _sum_wide_windows(
                        position, last, firsts[k], wide, coefficients[k]
                    )
                    _add_wide(lower, upper, party, out[i, columns[k]])
                else:
                    for q in range(used):
                        for half in range(2):
                            low[2 * q + half] = values[0, q % LANES, q // LANES, half]
                            squares[2 * q + half] = values[1, q % LANES, q // LANES, half]
                    total = sum_windows(position, last, firsts[k], low, squares, coefficients[k])
                    out[i, columns[k], 0] += -total if party else total
            if d + 1 < depth:
                first = last - kept[d + 1, 1]
                for node in range(kept[d + 1, 1] - kept[d + 1, 0] + 1):
                    vector, source = (first + node) // LANES, 2 * ((first + node) % LANES)
                    for half in range(2):
                        target = 2 * (node % LANES) + half
                        seeds[node // LANES, target] = grown[vector, source + half]
                        flags[node // LANES, target] = controls[vector, source + half]
