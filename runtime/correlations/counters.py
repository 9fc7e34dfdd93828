"""Point functions with a counter of 8 or 16 bits for each place, at several depths of one tree.

Who adds up the tables of many keys, entry by entry, has a share of a histogram of their places. The
tree is that of `dpf`. A leaf's value is a block of 128 bits: 16 counters of 8 bits or 8 of 16 bits,
added entry by entry modulo 2**8 or 2**16. A node above the leaves has a value as well, under a
cipher of its own, so that one key also serves the table of the place's top bits alone. Source: the
incremental point functions of Boneh, Boyle, Corrigan-Gibbs, Gilboa and Ishai, "Lightweight
Techniques for Private Heavy Hitters" (IEEE S&P 2021), whose value at a node is, as here, another
output of the generator than the children.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mergec.runtime.correlations.dpf import (
    BLOCK_WORDS,
    LEAF_BITS,
    SEED_WORDS,
    Correct,
    Generator,
    Keys,
    correct_level,
    grow_level,
    key_words,
    step_down,
)
from mergec.runtime.kernels.aes import (
    LANES,
    correct_counters,
    counters_of_leaves,
    descend,
    grow_trees,
    vectors,
)
from mergec.runtime.kernels.compiled import compiled

_PIECE = 256
"""Paths expanded at once by the library."""

_SUBTREE = 256
"""Most places that are expanded below the end of one path."""

_LOW = ~np.uint64(3)
"""Clears the bits of a root that no seed has (`dpf`)."""


@dataclass(frozen=True)
class Counters:
    """Keys of tables of counters.

    bits: of a counter, 8 or 16. widths: bits of a place in each of the tables, ascending. The
    entries of the last one are numbered by the whole place, those of the others by its top bits.
    Raises ValueError if a table has less entries than a leaf.
    """

    bits: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.depths) < 0:
            raise ValueError(f"a leaf has {self.leaf} counters of {self.bits} bits")

    @property
    def dtype(self) -> np.dtype:
        """The unsigned type of a counter."""
        return np.dtype(f"u{self.bits // 8}")

    @property
    def leaf(self) -> int:
        """Number of counters in a leaf."""
        return LEAF_BITS // self.bits

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Levels above the leaves of each table."""
        return tuple(width - (self.leaf.bit_length() - 1) for width in self.widths)

    @property
    def blocks(self) -> int:
        """Number of tables, and of blocks that the generator has to have."""
        return len(self.widths)

    @property
    def words(self) -> int:
        """Words of a key's corrections."""
        return key_words(self.depths[-1], BLOCK_WORDS * self.blocks)

    @property
    def dealt_bytes(self) -> int:
        """Bytes that the dealer sends to both parties together for one key."""
        return 2 * 8 * self.words

    def counting(self, places: np.ndarray, generator: Generator) -> Correct:
        """Corrections for keys with the counter one at each place, int64 [n], and zero elsewhere.

        For each table and entry, the client's share plus the server's is the counter.
        """
        places = np.ascontiguousarray(places)
        payload = np.zeros((len(places), BLOCK_WORDS * self.blocks), np.uint64)
        entries = payload.view(self.dtype).reshape(len(places), self.blocks, self.leaf)
        for block, width in enumerate(self.widths):
            entry = (places >> (self.widths[-1] - width)) % self.leaf
            entries[np.arange(len(places)), block, entry] = 1
        index = places >> (self.leaf.bit_length() - 1)

        def correct(roots: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            out = np.empty((len(index), self.words), np.uint64)
            if LANES:
                depths = np.array(self.depths)
                correct_counters(
                    generator.round_keys, *roots, index, payload, depths, self.bits, out
                )
            else:
                self.correct_by_library(roots, index, payload, generator, out)
            return out

        return correct

    def correct_by_library(
        self,
        roots: tuple[np.ndarray, np.ndarray],
        index: np.ndarray,
        payload: np.ndarray,
        generator: Generator,
        out: np.ndarray,
    ) -> None:
        """Like `kernels.aes.correct_counters`, for processors without AES instructions."""
        seeds = np.stack(roots) & _LOW
        bits = np.zeros(seeds.shape[:2], np.uint8)
        bits[1] = 1
        levels = self.depths[-1]
        for level in range(levels + 1):
            for block in np.flatnonzero(np.array(self.depths) == level):
                words = payload[:, BLOCK_WORDS * block : BLOCK_WORDS * (block + 1)]
                client, server = (generator.value(seeds)[block] ^ seeds).view(self.dtype)
                last = np.ascontiguousarray(words).view(self.dtype) - client + server
                last = np.where(bits[1][:, None] == 1, -last, last)
                first = SEED_WORDS * levels + BLOCK_WORDS * block
                out[:, first : first + BLOCK_WORDS] = last.view(np.uint64)
            if level < levels:
                left, right = generator.children(seeds)
                turn = ((index >> (levels - 1 - level)) & 1).astype(np.uint8)
                words = out[:, SEED_WORDS * level : SEED_WORDS * (level + 1)]
                correct_level(seeds, bits, left, right, turn, words)

    def tally(
        self,
        keys: Keys,
        table: int,
        first: np.ndarray,
        rows: np.ndarray,
        shape: tuple[int, int],
        party: int,
        generator: Generator,
    ) -> np.ndarray:
        """A party's shares of histograms, `shape` [R, N]: entry p of row r counts its keys at p.

        first: int64 [n]; a key whose place is first - p, modulo the size of table number `table`,
        counts at p. So p is a public number minus the place. rows: int64 [n], the row of each key.
        N is the size of the table, or so small that no entry of it is read twice. Local.
        """
        job = _Tally(self, table, shape[1])
        total = np.zeros((shape[0], job.padded), self.dtype)
        nodes, offsets = job.paths(first)
        expand = _tally_by_instructions if LANES else _tally_by_library
        expand(job, keys, nodes, offsets, rows, party, generator, total)
        found = total[:, job.group : job.group + job.count].copy()
        if job.whole:
            found += total[:, job.group + job.count :][:, : job.count]
        found = found[:, ::-1]
        return np.ascontiguousarray(-found if party else found)


@dataclass(frozen=True)
class _Tally:
    """Which parts of a key's tree a tally of `count` consecutive entries reads.

    A key's entries are read in groups that begin at multiples of their size: the subtree below one
    node each. They are added from the last entry of a row to the first, as that is the order of
    places, between margins that take what a group holds beside the row.
    """

    counters: Counters
    table: int
    count: int

    @property
    def size(self) -> int:
        """Entries of the table."""
        return 1 << self.counters.widths[self.table]

    @property
    def whole(self) -> bool:
        """Whether all of the table is read; its end then wraps to its begin."""
        return self.count == self.size

    @property
    def cut(self) -> int:
        """Levels from the end of a path to the leaves."""
        if self.whole:
            return self.counters.depths[self.table]
        few = min(self.count, _SUBTREE) - 1
        return min((few // self.counters.leaf).bit_length(), self.counters.depths[self.table])

    @property
    def group(self) -> int:
        """Entries below the end of a path."""
        return self.counters.leaf << self.cut

    @property
    def groups(self) -> int:
        """Paths of a key: as many groups as the entries may touch."""
        return 1 if self.whole else (self.count - 2) // self.group + 2

    @property
    def padded(self) -> int:
        """Entries of a row with its margins."""
        return self.count + 3 * self.group

    def paths(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every path the number of its node, and where its group begins in a padded row."""
        start = (first.astype(np.int64) - self.count + 1) % self.size
        if self.whole:
            return np.zeros((len(first), 1), np.int64), ((-start) % self.size + self.group)[:, None]
        each = np.arange(self.groups)
        nodes = (start[:, None] // self.group + each) % (self.size // self.group)
        return nodes, (each + 1) * self.group - (start % self.group)[:, None]


def _tally_by_instructions(
    job: _Tally,
    keys: Keys,
    nodes: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray,
    party: int,
    generator: Generator,
    total: np.ndarray,
) -> None:
    depths = job.counters.depths
    _tally_trees(
        generator.round_keys[[0, 1, 2 + job.table]], keys.roots,
        np.ascontiguousarray(keys.corrections), depths[-1] + job.table,
        nodes.reshape(-1), offsets.reshape(-1), rows, nodes.shape[1],
        depths[job.table] - job.cut, job.cut, party, total,
    )  # fmt: skip


def _tally_by_library(
    job: _Tally,
    keys: Keys,
    nodes: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray,
    party: int,
    generator: Generator,
    total: np.ndarray,
) -> None:
    """Like `_tally_by_instructions`, for processors without AES instructions."""
    depths, each = job.counters.depths, nodes.shape[1]
    top = depths[job.table] - job.cut
    first = SEED_WORDS * depths[-1] + BLOCK_WORDS * job.table
    flat, starts = nodes.reshape(-1), offsets.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        some = np.arange(start, min(start + _PIECE, len(flat)))
        words = np.ascontiguousarray(keys.corrections[some // each])
        seeds = keys.roots[some // each] & _LOW
        bits, passed = np.full(len(some), party, np.uint8), np.zeros(len(some), np.uint8)
        for level in range(top):
            left, right = generator.children(seeds)
            word = words[:, SEED_WORDS * level : SEED_WORDS * (level + 1)]
            turns = (flat[some] >> (top - 1 - level)) & 1
            step_down(seeds, bits, left, right, word, turns, 1, passed)
        seeds, bits = seeds[:, None], bits[:, None]
        for level in range(top, depths[job.table]):
            left, right = generator.children(seeds)
            grown = np.empty((len(some), 2 * seeds.shape[1], SEED_WORDS), np.uint64)
            controls = np.empty(grown.shape[:2], np.uint8)
            word = words[:, SEED_WORDS * level : SEED_WORDS * (level + 1)]
            grow_level(seeds, bits, left, right, word, grown, controls)
            seeds, bits = grown, controls
        raw = (generator.value(seeds)[job.table] ^ seeds).view(job.counters.dtype)
        last = words[:, first : first + BLOCK_WORDS].copy().view(job.counters.dtype)
        values = raw + bits[..., None].astype(job.counters.dtype) * last[:, None]
        for path, value in zip(some, values.reshape(len(some), -1), strict=True):
            total[rows[path // each], starts[path] : starts[path] + job.group] += value


@compiled()
def _tally_trees(  # type: ignore[no-untyped-def]
    ciphers, roots, corrections, block, nodes, offsets, rows, each, top, cut, party, total
):
    """block: which pair of words corrects the leaves' values."""
    leaves, bits = 1 << cut, 8 * total.itemsize
    seeds, flags, words = vectors(leaves), vectors(leaves), vectors(cut + 1)
    turns, passed = vectors(1), vectors(1)
    values = vectors(leaves).reshape(1, LANES, leaves, 2)
    lanes = np.empty(LANES, np.int64)
    for start in range(0, nodes.shape[0], LANES):
        for lane in range(LANES):
            # Lanes without a path repeat the last one.
            path = min(start + lane, nodes.shape[0] - 1)
            i = lanes[lane] = path // each
            for half in range(2):
                seeds[0, 2 * lane + half] = roots[i, half] & ~np.uint64(3)
                turns[0, 2 * lane + half] = nodes[path]
                for k in range(cut):
                    words[k, 2 * lane + half] = corrections[i, 2 * (top + k) + half]
                words[cut, 2 * lane + half] = corrections[i, 2 * block + half]
        flags[0] = np.uint64(0) - np.uint64(party)
        descend(ciphers, seeds, flags, turns, passed, corrections, lanes, top)
        grow_trees(ciphers, seeds, flags, words, cut)
        counters_of_leaves(ciphers, seeds, flags, words, cut, bits, values)
        for lane in range(min(LANES, nodes.shape[0] - start)):
            path = start + lane
            counters = values[0, lane].reshape(-1).view(total.dtype)
            target = total[rows[path // each], offsets[path] :]
            for k in range(counters.shape[0]):
                target[k] += counters[k]
