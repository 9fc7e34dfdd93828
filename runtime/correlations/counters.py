"""Point functions whose values are counters of 8 or 16 bits, one for each place.

Who adds up the tables of many keys, entry by entry, has a share of a histogram of their places. The
tree is that of `dpf`. A leaf's value is a block of 128 bits, 16 counters of 8 bits or 8 of 16 bits,
which are added one by one modulo 2**8 or 2**16. A party may read a few entries of a large table: it
grows only the parts of the tree that hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mergec.runtime.correlations.dpf import (
    BLOCK_WORDS,
    LEAF_BITS,
    SEED_WORDS,
    Correct,
    Generator,
    HostKeys,
    Keys,
    children,
    correct,
    key_words,
    step_down,
    unsigned,
)
from mergec.runtime.kernels import planes
from mergec.runtime.kernels.aes import (
    LANES,
    descend,
    grow_trees,
    values_of_leaves,
    vectors,
)
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled

_PIECE = 256
"""Paths expanded at once by the library."""

_SUBTREE = 256
"""Most places that are expanded below the end of one path."""

_LOW = ~np.uint64(3)
"""Clears the bits of a root that no seed has (`dpf`)."""


@dataclass(frozen=True)
class Counters:
    """Keys of tables of 2**width counters.

    bits: of a counter, 8 or 16. Raises ValueError if a table has less entries than a leaf.
    """

    bits: int
    width: int

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"a leaf has {self.leaf} counters of {self.bits} bits")

    @property
    def dtype(self) -> np.dtype:
        """The unsigned type of a counter."""
        return np.dtype(f"u{self.bits // 8}")

    @property
    def leaf(self) -> int:
        """Number of counters in a leaf."""
        return LEAF_BITS // self.bits

    @property
    def depth(self) -> int:
        """Levels above the leaves."""
        return self.width - (self.leaf.bit_length() - 1)

    @property
    def words(self) -> int:
        """Words of a key's corrections."""
        return key_words(self.depth, BLOCK_WORDS)

    @property
    def dealt_bytes(self) -> int:
        """Bytes that the dealer sends to both parties together for one key."""
        return 2 * 8 * self.words

    @property
    def kind(self) -> torch.dtype:
        """The signed type of a counter."""
        return torch.int8 if self.bits == 8 else torch.int16

    def counting(self, places: torch.Tensor, generator: Generator) -> Correct:
        """Corrections for keys with the counter one at each place, int64 [n], and zero elsewhere.

        For each entry, the client's share plus the server's is the counter. The generator has one
        block.
        """
        index, payload = _SINGLE(places, self.bits)
        return lambda roots: correct(
            roots, index, payload[None], (self.depth,), self.depth, generator, self.bits
        )

    def tally(
        self,
        keys: Keys,
        first: torch.Tensor,
        rows: torch.Tensor,
        shape: tuple[int, int],
        party: int,
        generator: Generator,
    ) -> torch.Tensor:
        """A party's shares of histograms, `shape` [R, N]: entry p of row r counts its keys at p.

        first: int64 [n]; a key whose place is first - p, modulo the size of the table, counts at p.
        So p is a public number minus the place. rows: int64 [n], the row of each key.
        N is the size of the table, or so small that no entry of it is read twice. Local. Returns
        signed words of `bits` bits.
        """
        job = Tally(self, shape[1])
        total = _TALLY(keys.roots, keys.corrections, first, rows, job, shape[0], party, generator)
        found = total[:, job.group : job.group + job.count]
        if job.whole:
            found = found + total[:, job.group + job.count :][:, : job.count]
        found = found.flip(1)
        return -found if party else found


def _single_host(places: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = LEAF_BITS // bits
    index, payload = places.numpy(), np.zeros((len(places), BLOCK_WORDS), np.int64)
    payload.view(f"u{bits // 8}")[np.arange(len(places)), index % leaf] = 1
    return torch.from_numpy(index >> (leaf.bit_length() - 1)), torch.from_numpy(payload)


def _single_tensors(places: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leaf of each counter, and its words with only this counter, one, in them."""
    leaf = LEAF_BITS // bits
    bit = (places & (leaf - 1)) * bits
    word = torch.arange(BLOCK_WORDS, device=places.device) == (bit >> 6)[:, None]
    return places >> (leaf.bit_length() - 1), word.long() << (bit & 63)[:, None]


_SINGLE = Kernel("elements.single", _single_host, _single_tensors, triton=False)


@dataclass(frozen=True)
class Tally:
    """Which parts of a key's tree a tally of `count` consecutive entries reads.

    A key's entries are read in groups that begin at multiples of their size: the subtree below one
    node each. They are added from the last entry of a row to the first, as that is the order of
    places, between margins that take what a group holds beside the row.
    """

    counters: Counters
    count: int

    @property
    def size(self) -> int:
        """Entries of the table."""
        return 1 << self.counters.width

    @property
    def whole(self) -> bool:
        """Whether all of the table is read; its end then wraps to its begin."""
        return self.count == self.size

    @property
    def cut(self) -> int:
        """Levels from the end of a path to the leaves."""
        if self.whole:
            return self.counters.depth
        few = min(self.count, _SUBTREE) - 1
        return min((few // self.counters.leaf).bit_length(), self.counters.depth)

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

    def paths(self, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For every path the number of its node, and where its group begins in a padded row."""
        start = (first - self.count + 1) & (self.size - 1)
        if self.whole:
            nodes = torch.zeros_like(start)[:, None]
            return nodes, ((-start & (self.size - 1)) + self.group)[:, None]
        each = torch.arange(self.groups, device=first.device)
        bits = self.group.bit_length() - 1
        nodes = ((start >> bits)[:, None] + each) & ((self.size >> bits) - 1)
        return nodes, (each + 1) * self.group - (start & (self.group - 1))[:, None]


def _tally_host(
    roots: torch.Tensor,
    corrections: torch.Tensor,
    first: torch.Tensor,
    rows: torch.Tensor,
    job: Tally,
    count: int,
    party: int,
    generator: Generator,
) -> torch.Tensor:
    """The counters of all paths, added up: words of `bits` bits [count, padded]."""
    total = np.zeros((count, job.padded), job.counters.dtype)
    nodes, offsets = (each.numpy() for each in job.paths(first))
    keys = HostKeys(unsigned(roots), unsigned(corrections))
    expand = _tally_by_instructions if LANES else _tally_by_library
    expand(job, keys, nodes, offsets, rows.numpy(), party, generator, total)
    return torch.from_numpy(total).view(job.counters.kind)


_TALLY = Kernel("trees.tally", _tally_host, planes.tally)


def _tally_by_instructions(
    job: Tally,
    keys: HostKeys,
    nodes: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray,
    party: int,
    generator: Generator,
    total: np.ndarray,
) -> None:
    _tally_trees(
        generator.round_keys, *keys,
        nodes.reshape(-1), offsets.reshape(-1), rows, nodes.shape[1],
        job.counters.depth - job.cut, job.cut, party, total,
    )  # fmt: skip


def _tally_by_library(
    job: Tally,
    keys: HostKeys,
    nodes: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray,
    party: int,
    generator: Generator,
    total: np.ndarray,
) -> None:
    """Like `_tally_by_instructions`, for processors without AES instructions."""
    depth, each = job.counters.depth, nodes.shape[1]
    top = depth - job.cut
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
        for level in range(top, depth):
            seeds, bits = children(seeds, bits, HostKeys(keys.roots, words), level, generator)
        raw = (generator.value(seeds)[0] ^ seeds).view(job.counters.dtype)
        last = words[:, -BLOCK_WORDS:].copy().view(job.counters.dtype)
        values = raw + bits[..., None].astype(job.counters.dtype) * last[:, None]
        for path, value in zip(some, values.reshape(len(some), -1), strict=True):
            total[rows[path // each], starts[path] : starts[path] + job.group] += value


@compiled()
def _tally_trees(  # type: ignore[no-untyped-def]
    ciphers, roots, corrections, nodes, offsets, rows, each, top, cut, party, total
):
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
                for k in range(cut + 1):
                    words[k, 2 * lane + half] = corrections[i, 2 * (top + k) + half]
        flags[0] = np.uint64(0) - np.uint64(party)
        descend(ciphers, seeds, flags, turns, passed, corrections, lanes, top)
        grow_trees(ciphers, seeds, flags, words, cut)
        values_of_leaves(ciphers, seeds, flags, words, cut, bits, values)
        for lane in range(min(LANES, nodes.shape[0] - start)):
            path = start + lane
            counters = values[0, lane].reshape(-1).view(total.dtype)
            target = total[rows[path // each], offsets[path] :]
            for k in range(counters.shape[0]):
                target[k] += counters[k]
