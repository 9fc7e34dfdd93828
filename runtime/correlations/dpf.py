"""Distributed point functions: two short keys for a table that is zero but in one, unknown place.

The tree of Boyle, Gilboa and Ishai, "Function Secret Sharing: Improvements and Extensions" (CCS
2016), figure 1, evaluated on its whole domain, with keys dealt by the dealer. Each party grows a
binary tree from a root of its own. A node is a seed of 126 bits and a control bit; by it a
correction word, the same for all nodes of a level, is added to the two children that a
pseudo-random generator makes of the seed. The words are chosen so that the parties' nodes are equal
everywhere but on the path to the special leaf, where the seeds are independent and the control bits
differ. So what equal leaves are turned into cancels out, and a last correction word makes the
special leaf's the wanted value.

What a party sees are its root and the correction words. Each of them is masked by a child of the
other party's node on the path, a pseudo-random value that it does not know: so they look uniform,
whatever the place and the value are. A key is made of fresh roots and evaluated once.

The generator is G_i(s) = AES_i(s) xor s with fixed public keys, one for each block of output, as in
Wang et al., "Splinter" (NSDI 2017). Roots have 124 bits, as the two lowest of both words are left
out: in the ideal cipher model q evaluations of AES tell one of N seeds from random with probability
at most q N / 2**124.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from mergec.runtime.kernels.aes import LANES, correct_paths, expand_keys, parities_before
from mergec.runtime.kernels.compiled import compiled

SEED_WORDS = 2
"""Words of 64 bits of a root, and of the correction word of a level."""

BLOCK_WORDS = 2
"""Words of 64 bits that one evaluation of AES gives."""

LEAF_BITS = 64 * BLOCK_WORDS
"""Bits of a table that one leaf holds."""

_LOW = np.uint64(3)
"""A seed's two lowest bits are zero: in a child they are control bits, for left and for right.

In a root they are zero in both of its words.
"""


Correct = Callable[[tuple[np.ndarray, np.ndarray]], np.ndarray]
"""What the dealer makes corrections by, from the roots of client and server."""


@dataclass(frozen=True)
class Keys:
    """One party's keys of n point functions.

    roots: uint64 [n, 2], its own. corrections: uint64 [n, words], the same at both parties.
    """

    roots: np.ndarray
    corrections: np.ndarray


class _Ciphers(threading.local):
    """The library's ciphers by name, made once in each thread: two must not use one at once."""

    def __init__(self) -> None:
        self._made: dict[str, CipherContext] = {}

    def __getitem__(self, name: str) -> CipherContext:
        if name not in self._made:
            cipher = Cipher(algorithms.AES(_fixed_key(name)), modes.ECB())
            self._made[name] = cipher.encryptor()
        return self._made[name]


_CIPHERS = _Ciphers()


class Generator:
    """AES under fixed keys: the two children of a seed, and `blocks` blocks of a leaf's value."""

    def __init__(self, blocks: int) -> None:
        self._names = ["left", "right", *(f"value {i}" for i in range(blocks))]
        self.blocks = blocks

    @property
    def round_keys(self) -> np.ndarray:
        """The same ciphers for `runtime.kernels.aes`."""
        return _round_keys(tuple(self._names))

    def children(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AES of seeds [..., 2] under the left and the right key; the seeds are yet to be added."""
        return self._encrypt(0, seeds), self._encrypt(1, seeds)

    def value(self, seeds: np.ndarray) -> np.ndarray:
        """What leaves [..., 2] are turned into: [blocks, ..., 2]; the seeds are yet to be added."""
        return np.stack([self._encrypt(2 + i, seeds) for i in range(self.blocks)])

    def _encrypt(self, key: int, seeds: np.ndarray) -> np.ndarray:
        # update_into wants room for one more cipher block than it writes.
        out = np.empty(seeds.size + BLOCK_WORDS, np.uint64)
        _CIPHERS[self._names[key]].update_into(seeds.data.cast("B"), out.view(np.uint8).data)
        return out[: seeds.size].reshape(seeds.shape)


@cache
def _fixed_key(name: str) -> bytes:
    return hashlib.blake2b(f"mergec point function: {name}".encode(), digest_size=16).digest()


@cache
def _round_keys(names: tuple[str, ...]) -> np.ndarray:
    return expand_keys([_fixed_key(name) for name in names])


def key_words(depth: int, last: int) -> int:
    """Words of a key's corrections, if the last correction has `last` words."""
    return SEED_WORDS * depth + last


def correct(
    roots: tuple[np.ndarray, np.ndarray],
    index: np.ndarray,
    payload: np.ndarray,
    depth: int,
    generator: Generator,
    additive: bool,
) -> np.ndarray:
    """The dealer's part: correction words for n keys, uint64 [n, 2 * depth + W].

    roots: of client and server, uint64 [n, 2]. index: int64 [n], the special leaf's number, below
    2**depth. payload: uint64 [n, W], what this leaf has to become with the last correction: the
    client's share minus the server's modulo 2**64 if `additive`, otherwise the XOR of both.
    """
    out = np.empty((len(index), key_words(depth, payload.shape[1])), np.uint64)
    if LANES:
        correct_paths(generator.round_keys, *roots, index, payload, depth, additive, out)
    else:
        correct_by_library(roots, index, payload, depth, generator, additive, out)
    return out


def correct_by_library(
    roots: tuple[np.ndarray, np.ndarray],
    index: np.ndarray,
    payload: np.ndarray,
    depth: int,
    generator: Generator,
    additive: bool,
    out: np.ndarray,
) -> None:
    """Write what `correct` gives, on processors without instructions for AES."""
    seeds = np.stack(roots) & ~_LOW
    bits = np.zeros(seeds.shape[:2], np.uint8)
    bits[1] = 1
    for level in range(depth):
        left, right = generator.children(seeds)
        turn = ((index >> (depth - 1 - level)) & 1).astype(np.uint8)
        words = out[:, SEED_WORDS * level : SEED_WORDS * (level + 1)]
        _correct_level(seeds, bits, left, right, turn, words)
    client, server = np.concatenate(list(generator.value(seeds) ^ seeds), axis=-1)
    last = payload - client + server if additive else payload ^ client ^ server
    negative = additive & (bits[1] == 1)
    out[:, SEED_WORDS * depth :] = np.where(negative[:, None], -last, last)


def grow(keys: Keys, depth: int, party: int, generator: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A party's leaves of n keys, in order: seeds uint64 [n, 2**depth, 2] and bits [n, 2**depth].

    party: 0 (client) or 1 (server). The last correction is left alone.
    """
    seeds = (keys.roots & ~_LOW)[:, None]
    bits = np.full(seeds.shape[:2], party, np.uint8)
    for level in range(depth):
        left, right = generator.children(seeds)
        grown = np.empty((len(seeds), 2 * seeds.shape[1], SEED_WORDS), np.uint64)
        controls = np.empty(grown.shape[:2], np.uint8)
        word = keys.corrections[:, SEED_WORDS * level : SEED_WORDS * (level + 1)]
        _grow_level(seeds, bits, left, right, word, grown, controls)
        seeds, bits = grown, controls
    return seeds, bits


def sharing_words(
    index: np.ndarray, payload: np.ndarray, depth: int, generator: Generator
) -> Correct:
    """Corrections for tables of zeros but for words `payload` [n, W] in row `index` [n].

    Leaf by leaf the client's value plus its bit times the last correction word, minus the same of
    the server, is the table modulo 2**64.
    """
    index, words = np.ascontiguousarray(index), np.ascontiguousarray(payload).view(np.uint64)
    return lambda roots: correct(roots, index, words, depth, generator, additive=True)


def sharing_bits(index: np.ndarray, depth: int, generator: Generator) -> Correct:
    """Corrections for tables of one bit that is set at `index` [n], below 128 * 2**depth.

    A leaf holds 128 of them: the early termination of that paper.
    """

    leaf, payload = np.empty(len(index), np.int64), np.zeros((len(index), BLOCK_WORDS), np.uint64)
    _set_bits(index, leaf, payload)
    return lambda roots: correct(roots, leaf, payload, depth, generator, additive=False)


def parities(
    keys: Keys, places: np.ndarray, depth: int, party: int, generator: Generator
) -> np.ndarray:
    """XOR shares of [index < place] for tables of `sharing_bits`: uint8 [n, P] for int64 [n, P].

    A node's control bits are XOR shares of whether the index is below it. So on the way down to a
    place, those of the left neighbours that are passed by tell of all leaves before the last.
    Source: the prefix parities of Storrier et al., "Grotto" (CCS 2023).
    """
    places = np.ascontiguousarray(places)
    found = np.empty(places.shape, np.uint8)
    if LANES:
        ciphers = generator.round_keys
        parities_before(ciphers, keys.roots, keys.corrections, places, depth, party, found)
    else:
        parities_by_library(keys, places, depth, party, generator, found)
    return found


def parities_by_library(
    keys: Keys, places: np.ndarray, depth: int, party: int, generator: Generator, out: np.ndarray
) -> None:
    """Write what `parities` gives, on processors without instructions for AES."""
    each = places.shape[1]
    seeds = np.repeat(keys.roots & ~_LOW, each, axis=0)
    bits = np.full(len(seeds), party, np.uint8)
    out[:] = 0
    found, flat = out.reshape(-1), places.reshape(-1)
    for level in range(depth):
        left, right = generator.children(seeds)
        word = keys.corrections[:, SEED_WORDS * level : SEED_WORDS * (level + 1)]
        turns = (flat >> (depth - 1 - level)) // LEAF_BITS & 1
        _step_down(seeds, bits, left, right, word, turns, each, found)
    leaves = generator.value(seeds)[0] ^ seeds
    _count_before(leaves, bits, keys.corrections[:, -BLOCK_WORDS:], flat, each, found)


@compiled()
def _set_bits(index, leaf, payload):  # type: ignore[no-untyped-def]
    """The leaf that holds a bit, and the leaf's words with this bit alone."""
    for i in range(index.shape[0]):
        leaf[i] = index[i] // LEAF_BITS
        payload[i, (index[i] >> 6) % BLOCK_WORDS] = np.uint64(1) << np.uint64(index[i] & 63)


@compiled()
def _grow_level(seeds, bits, left, right, words, grown, controls):  # type: ignore[no-untyped-def]
    low, one = np.uint64(3), np.uint64(1)
    for i in range(seeds.shape[0]):
        first, second = words[i, 0], words[i, 1]
        for j in range(seeds.shape[1]):
            chosen = np.uint64(0) - np.uint64(bits[i, j])
            a, b = seeds[i, j, 0] ^ (chosen & first), seeds[i, j, 1] ^ (chosen & second)
            child = left[i, j, 0] ^ a
            grown[i, 2 * j, 0] = child & ~low
            grown[i, 2 * j, 1] = left[i, j, 1] ^ b
            controls[i, 2 * j] = child & one
            child = right[i, j, 0] ^ a
            grown[i, 2 * j + 1, 0] = child & ~low
            grown[i, 2 * j + 1, 1] = right[i, j, 1] ^ b
            controls[i, 2 * j + 1] = (child >> one) & one


@compiled()
def _correct_level(seeds, bits, left, right, turn, words):  # type: ignore[no-untyped-def]
    """Choose the correction word of a level, and go down the path: `seeds` and `bits` change."""
    low, one = np.uint64(3), np.uint64(1)
    for i in range(seeds.shape[1]):
        right_turn = np.uint64(turn[i])
        # The child that is left behind has to become the same at both.
        lost, kept = (left, right) if turn[i] else (right, left)
        first = np.uint64(0)
        second = np.uint64(0)
        left_bit = right_turn ^ one
        right_bit = right_turn
        for party in range(2):
            first ^= lost[party, i, 0] ^ seeds[party, i, 0]
            second ^= lost[party, i, 1] ^ seeds[party, i, 1]
            left_bit ^= left[party, i, 0] ^ seeds[party, i, 0]
            right_bit ^= (right[party, i, 0] ^ seeds[party, i, 0]) >> one
        first = (first & ~low) | (left_bit & one) | ((right_bit & one) << one)
        words[i, 0], words[i, 1] = first, second
        for party in range(2):
            chosen = np.uint64(0) - np.uint64(bits[party, i])
            child = kept[party, i, 0] ^ seeds[party, i, 0] ^ (chosen & first)
            seeds[party, i, 1] ^= kept[party, i, 1] ^ (chosen & second)
            seeds[party, i, 0] = child & ~low
            bits[party, i] = (child >> right_turn) & one


@compiled()
def _step_down(  # type: ignore[no-untyped-def]
    seeds, bits, left, right, words, turns, each, found
):
    """Go on to the child that `turns` says; what is to the left of it is counted in `found`."""
    low, one = np.uint64(3), np.uint64(1)
    for i in range(seeds.shape[0]):
        chosen = np.uint64(0) - np.uint64(bits[i])
        first = seeds[i, 0] ^ (chosen & words[i // each, 0])
        second = seeds[i, 1] ^ (chosen & words[i // each, 1])
        if turns[i]:
            found[i] ^= (left[i, 0] ^ first) & one
            child = right[i, 0] ^ first
            seeds[i, 1] = right[i, 1] ^ second
            bits[i] = (child >> one) & one
        else:
            child = left[i, 0] ^ first
            seeds[i, 1] = left[i, 1] ^ second
            bits[i] = child & one
        seeds[i, 0] = child & ~low


@compiled()
def _count_before(leaves, bits, last, places, each, found):  # type: ignore[no-untyped-def]
    """Add the parity of a leaf's bits before the place."""
    one = np.uint64(1)
    for i in range(leaves.shape[0]):
        chosen = np.uint64(0) - np.uint64(bits[i])
        place = places[i] & 127
        low = leaves[i, 0] ^ (chosen & last[i // each, 0])
        high = leaves[i, 1] ^ (chosen & last[i // each, 1])
        cut = (one << np.uint64(place & 63)) - one
        parity = (low & cut) if place < 64 else low ^ (high & cut)
        for shift in (32, 16, 8, 4, 2, 1):
            parity ^= parity >> np.uint64(shift)
        found[i] ^= parity & one
