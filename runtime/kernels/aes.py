"""AES-128 under fixed keys by the processor's instructions, and trees of seeds grown by it.

A library's cipher works on one buffer at a call. Trees of a hundred leaves, of which a step grows
tens of thousands, then cost more for calls, and for buffers that are written and read again, than
for the cipher. Here a tree stays in the first cache from its root to its leaves. `LANES` trees grow
at a time, as many as one instruction encrypts blocks, and everything is done for all alike: neither
time nor memory accesses depend on a seed.

An array of nodes or of words holds vectors: for each of `LANES` trees two words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from runtime.kernels.compiled import compiled

_ROUNDS = 10
_KEYS = _ROUNDS + 1
"""Round keys of a cipher."""

_LINE_WORDS = 8
"""Words of a line of the cache. What lies in two of them takes twice as long to be read."""

_WORD = ir.IntType(64)


def _lanes() -> int:
    """Blocks that one instruction of this processor encrypts; 0 where it has none for AES."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("vaes") and features.get("avx512f"):
        return 4
    if features.get("vaes") and features.get("avx2"):
        return 2
    return int(bool(features.get("aes")))


LANES = _lanes()
_VECTOR = ir.VectorType(_WORD, 2 * max(1, LANES))


def _call(builder: Any, name: str, state: Any, key: Any) -> Any:
    """One round of all lanes by `aesenc` or `aesenclast`."""
    suffix = "" if LANES == 1 else f".{128 * LANES}"
    kind = ir.FunctionType(_VECTOR, (_VECTOR, _VECTOR))
    module = builder.module
    function = module.globals.get(f"llvm.x86.aesni.{name}{suffix}") or ir.Function(
        module, kind, f"llvm.x86.aesni.{name}{suffix}"
    )
    return builder.call(function, (state, key))


class _Vectors:
    """An array of words as vectors, inside of an intrinsic."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        data = context.make_array(kind)(context, builder, array).data
        self._builder = builder
        self._data = builder.bitcast(data, _VECTOR.as_pointer())

    def _at(self, index: Any) -> Any:
        return self._builder.gep(self._data, [index])

    def load(self, index: Any) -> Any:
        return self._builder.load(self._at(index), align=8)

    def store(self, index: Any, value: Any) -> None:
        self._builder.store(value, self._at(index), align=8)


def _encrypt(builder: Any, state: Any, keys: _Vectors, number: Any) -> Any:
    """AES of a vector of blocks under the key of this number."""
    first = builder.mul(number, _WORD(_KEYS))
    state = builder.xor(state, keys.load(first))
    for i in range(1, _ROUNDS):
        state = _call(builder, "aesenc", state, keys.load(builder.add(first, _WORD(i))))
    return _call(builder, "aesenclast", state, keys.load(builder.add(first, _WORD(_ROUNDS))))


def _all(*words: int) -> Any:
    """A constant vector with these two words in each lane."""
    return ir.Constant(_VECTOR, list(words) * max(1, LANES))


def _split(builder: Any, child: Any, bit: int) -> tuple[Any, Any]:
    """A child as seed, without its two lowest bits, and all ones where control bit `bit` is set."""
    lowest = [2 * (i // 2) for i in range(_VECTOR.count)]
    order = ir.Constant(ir.VectorType(ir.IntType(32), _VECTOR.count), lowest)
    both = builder.shuffle_vector(child, ir.Constant(_VECTOR, ir.Undefined), order)
    chosen = builder.and_(builder.lshr(both, _all(bit, bit)), _all(1, 1))
    return builder.and_(child, _all(-4, -1)), builder.sub(_all(0, 0), chosen)


@intrinsic
def _grow_node(typing, keys, seeds, flags, words, node, level):  # type: ignore[no-untyped-def]
    """Replace node `node` of a level by its children, at twice its place and the next."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        ciphers, grown, chosen, corrections = (
            _Vectors(context, builder, signature.args[i], args[i]) for i in range(4)
        )
        node, level = args[4:]
        seed = grown.load(node)
        correction = builder.and_(chosen.load(node), corrections.load(level))
        parent = builder.xor(seed, correction)
        for bit in range(2):
            child = builder.xor(_encrypt(builder, seed, ciphers, _WORD(bit)), parent)
            place = builder.add(builder.shl(node, _WORD(1)), _WORD(bit))
            kept, flag = _split(builder, child, bit)
            grown.store(place, kept)
            chosen.store(place, flag)
        return context.get_dummy_value()

    return types.void(keys, seeds, flags, words, types.int64, types.int64), generate


@intrinsic
def _value_of_leaf(  # type: ignore[no-untyped-def]
    typing, keys, seeds, flags, words, leaf, word, block, out
):
    """Write what a leaf is turned into by the cipher 2 + `block`: out [blocks, lanes, leaves, 2].

    The last correction, `words` [word], is added modulo 2**64 where the flag is set.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        ciphers, grown, chosen, corrections = (
            _Vectors(context, builder, signature.args[i], args[i]) for i in range(4)
        )
        leaf, word, block = args[4:7]
        seed = grown.load(leaf)
        value = builder.xor(_encrypt(builder, seed, ciphers, builder.add(block, _WORD(2))), seed)
        value = builder.add(value, builder.and_(chosen.load(leaf), corrections.load(word)))
        array = context.make_array(signature.args[7])(context, builder, args[7])
        pair = ir.VectorType(_WORD, 2)
        data = builder.bitcast(array.data, pair.as_pointer())
        leaves = builder.extract_value(array.shape, 2)
        place = builder.add(builder.mul(builder.mul(block, _WORD(LANES)), leaves), leaf)
        for lane in range(LANES):
            order = ir.Constant(ir.VectorType(ir.IntType(32), 2), [2 * lane, 2 * lane + 1])
            own = builder.shuffle_vector(value, ir.Constant(_VECTOR, ir.Undefined), order)
            builder.store(own, builder.gep(data, [place]), align=8)
            place = builder.add(place, leaves)
        return context.get_dummy_value()

    return types.void(
        keys, seeds, flags, words, types.int64, types.int64, types.int64, out
    ), generate


@compiled()
def vectors(count):  # type: ignore[no-untyped-def]
    """Room for so many vectors, uint64 [count, 2 * LANES], each in one line of the cache."""
    size = count * 2 * LANES
    words = np.empty(size + _LINE_WORDS, np.uint64)
    first = (-words.ctypes.data // 8) % _LINE_WORDS
    return words[first : first + size].reshape(count, 2 * LANES)


@intrinsic
def _last_round(typing, states):  # type: ignore[no-untyped-def]
    """Put a vector through AES's last round with a key of zeros: it substitutes bytes."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array = _Vectors(context, builder, signature.args[0], args[0])
        state = array.load(_WORD(0))
        array.store(_WORD(0), _call(builder, "aesenclast", state, _all(0, 0)))
        return context.get_dummy_value()

    return types.void(states), generate


@compiled()
def _substitute(states):  # type: ignore[no-untyped-def]
    _last_round(states)


def _substituted(word: int) -> int:
    """AES's S-box on the four bytes of a word."""
    # With four equal columns the shift of the rows changes nothing.
    states = np.full(2 * LANES, word << 32 | word, np.uint64)
    _substitute(states)
    return int(states[0]) & 0xFFFFFFFF


def expand_keys(keys: Sequence[bytes]) -> np.ndarray:
    """The round keys of AES-128 (FIPS 197, section 5.2), [keys, 11, 2 * LANES] words."""
    result = []
    for key in keys:
        words = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 16, 4)]
        constant = 1
        for i in range(4, 4 * _KEYS):
            word = words[-1]
            if i % 4 == 0:
                word = _substituted(word >> 8 | (word & 0xFF) << 24) ^ constant
                constant = constant << 1 ^ (0x11B if constant & 0x80 else 0)
            words.append(words[-4] ^ word)
        result.append(np.array(words, np.uint32).view(np.uint64).reshape(_KEYS, 2))
    expanded = vectors(len(keys) * _KEYS).reshape(len(keys), _KEYS, -1)
    expanded[:] = np.tile(np.stack(result), (1, 1, LANES))
    return expanded


@compiled()
def grow_trees(keys, seeds, flags, words, depth):  # type: ignore[no-untyped-def]
    """Grow LANES trees in place, from their roots in the first vector of `seeds` and `flags`.

    keys: of `expand_keys`, for left and right children. seeds: [2**depth, 2 * LANES]. flags: the
    same, all ones where a node's control bit is set. words: the levels' corrections, a vector each.
    """
    for level in range(depth):
        # From the last node on, as children take the places of nodes after their parent's.
        for node in range((1 << level) - 1, -1, -1):
            _grow_node(keys, seeds, flags, words, node, level)


@compiled()
def values_of_leaves(keys, seeds, flags, words, depth, out):  # type: ignore[no-untyped-def]
    """What leaves are turned into, out [blocks, LANES, 2**depth, 2], with the last correction.

    words: as in `grow_trees`, and after those a vector for each block.
    """
    for block in range(out.shape[0]):
        for leaf in range(out.shape[2]):
            _value_of_leaf(keys, seeds, flags, words, leaf, depth + block, block, out)
