"""AES-128 under fixed keys with the processor's AES instructions, and seed trees grown with it.

A library's cipher processes one buffer per call. For trees of a hundred leaves, of which a step
grows tens of thousands, calls, and buffers that are written and read again, would cost more than
the cipher. Here a tree stays in the L1 cache from its root to its leaves. `LANES` trees grow at a
time, as many as the blocks that one instruction encrypts. All lanes execute the same operations, so
neither time nor memory accesses depend on a seed. Single paths are descended in the same way: by
the dealer, those of both parties to the special leaf; by a party, the one to a public place.

An array of nodes or words holds vectors: two 64-bit words for each of `LANES` trees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from mergec.runtime.kernels.compiled import compiled

_ROUNDS = 10
_KEYS = _ROUNDS + 1
"""Round keys per cipher."""

_LINE_WORDS = 8
"""Words of a cache line. A vector that spans two lines takes twice as long to read."""

_GROUPS = 8
"""Vectors of paths that are descended together, so that none waits for another's AES latency."""

_WORD = ir.IntType(64)
_PAIR = ir.VectorType(_WORD, 2)


def _lanes() -> int:
    """Blocks that one instruction of this processor encrypts; 0 if it has no AES instructions."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("vaes") and features.get("avx512f"):
        return 4
    if features.get("vaes") and features.get("avx2"):
        return 2
    return int(bool(features.get("aes")))


LANES = _lanes()
_VECTOR = ir.VectorType(_WORD, 2 * max(1, LANES))


def _call(builder: Any, name: str, state: Any, key: Any) -> Any:
    """One AES round on all lanes, with `aesenc` or `aesenclast`."""
    suffix = "" if LANES == 1 else f".{128 * LANES}"
    kind = ir.FunctionType(_VECTOR, (_VECTOR, _VECTOR))
    module = builder.module
    function = module.globals.get(f"llvm.x86.aesni.{name}{suffix}") or ir.Function(
        module, kind, f"llvm.x86.aesni.{name}{suffix}"
    )
    return builder.call(function, (state, key))


class _Vectors:
    """An array of words as vectors, within an intrinsic."""

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


class _Rows:
    """An array of words in which each lane reads its own row, within an intrinsic."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any, rows: Any) -> None:
        """rows: row number of each lane; a pointer to words."""
        made = context.make_array(kind)(context, builder, array)
        data = builder.bitcast(made.data, _PAIR.as_pointer())
        pairs = builder.lshr(builder.extract_value(made.shape, 1), _WORD(1))
        self._builder = builder
        self._starts = [
            builder.gep(data, [builder.mul(builder.load(builder.gep(rows, [_WORD(i)])), pairs)])
            for i in range(LANES)
        ]

    def load(self, pair: Any) -> Any:
        """Words 2 * pair and 2 * pair + 1 of all rows."""
        parts = [
            self._builder.load(self._builder.gep(start, [pair]), align=8) for start in self._starts
        ]
        while len(parts) > 1:
            order = _order(range(2 * parts[0].type.count))
            halves = zip(parts[::2], parts[1::2], strict=True)
            parts = [self._builder.shuffle_vector(*both, order) for both in halves]
        return parts[0]

    def store(self, pair: Any, value: Any) -> None:
        for lane, start in enumerate(self._starts):
            place = self._builder.gep(start, [pair])
            self._builder.store(_of_lane(self._builder, value, lane), place, align=8)


def _order(places: Iterable[int]) -> Any:
    """The index vector of a shuffle."""
    chosen = list(places)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), chosen)


def _of_lane(builder: Any, value: Any, lane: int) -> Any:
    """The two words of a lane."""
    order = _order((2 * lane, 2 * lane + 1))
    return builder.shuffle_vector(value, ir.Constant(_VECTOR, ir.Undefined), order)


def _choose(builder: Any, wanted: Any, one: Any, other: Any) -> Any:
    """`one` in lanes where `wanted` is all ones, `other` where it is all zeros."""
    return builder.xor(other, builder.and_(wanted, builder.xor(one, other)))


def _bit(builder: Any, words: Any, place: Any) -> Any:
    """All ones where bit `place` of a word is set, all zeros elsewhere."""
    found = builder.and_(builder.lshr(words, place), _all(1, 1))
    return builder.sub(_all(0, 0), found)


def _encrypt(builder: Any, state: Any, keys: _Vectors, number: Any) -> Any:
    """AES of a vector of blocks under key `number`."""
    first = builder.mul(number, _WORD(_KEYS))
    state = builder.xor(state, keys.load(first))
    for i in range(1, _ROUNDS):
        state = _call(builder, "aesenc", state, keys.load(builder.add(first, _WORD(i))))
    return _call(builder, "aesenclast", state, keys.load(builder.add(first, _WORD(_ROUNDS))))


def _all(*words: int) -> Any:
    """A constant vector with these two words in each lane."""
    return ir.Constant(_VECTOR, list(words) * max(1, LANES))


def _split(builder: Any, child: Any, bit: int) -> tuple[Any, Any]:
    """A child as a seed (two lowest bits cleared), and all ones where control bit `bit` is set."""
    return builder.and_(child, _all(-4, -1)), _bit(builder, _lower(builder, child), _all(bit, bit))


def _lower(builder: Any, words: Any) -> Any:
    """The lower word of each lane, twice."""
    order = _order(2 * (i // 2) for i in range(_VECTOR.count))
    return builder.shuffle_vector(words, ir.Constant(_VECTOR, ir.Undefined), order)


def _spread(builder: Any, word: Any) -> Any:
    """A vector with the word in every position."""
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), word, _WORD(0))
    return builder.shuffle_vector(first, first, _order([0] * _VECTOR.count))


@intrinsic
def _grow_node(typing, keys, seeds, flags, words, node, level):  # type: ignore[no-untyped-def]
    """Replace node `node` of a level by its children, at positions 2 * node and 2 * node + 1."""

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


def _lanewise(builder: Any, name: str, one: Any, other: Any, bits: int) -> Any:
    """`add` or `sub` of two vectors, number by number of `bits` bits."""
    kind = ir.VectorType(ir.IntType(bits), _VECTOR.count * 64 // bits)
    found = getattr(builder, name)(builder.bitcast(one, kind), builder.bitcast(other, kind))
    return builder.bitcast(found, _VECTOR)


def _valuing(bits: int) -> Any:
    """Writes a block of a leaf's value, by cipher 2 + `block`: out [blocks, lanes, leaves, 2].

    The last correction, `words` [word], is added where the flag is set, number by number of `bits`
    bits.
    """

    @intrinsic
    def value(  # type: ignore[no-untyped-def]
        typing, keys, seeds, flags, words, leaf, word, block, out
    ):

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            ciphers, grown, chosen, corrections = (
                _Vectors(context, builder, signature.args[i], args[i]) for i in range(4)
            )
            leaf, word, block = args[4:7]
            seed = grown.load(leaf)
            value = builder.xor(
                _encrypt(builder, seed, ciphers, builder.add(block, _WORD(2))), seed
            )
            last = builder.and_(chosen.load(leaf), corrections.load(word))
            value = _lanewise(builder, "add", value, last, bits)
            array = context.make_array(signature.args[7])(context, builder, args[7])
            data = builder.bitcast(array.data, _PAIR.as_pointer())
            leaves = builder.extract_value(array.shape, 2)
            place = builder.add(builder.mul(builder.mul(block, _WORD(LANES)), leaves), leaf)
            for lane in range(LANES):
                own = _of_lane(builder, value, lane)
                builder.store(own, builder.gep(data, [place]), align=8)
                place = builder.add(place, leaves)
            return context.get_dummy_value()

        return types.void(
            keys, seeds, flags, words, types.int64, types.int64, types.int64, out
        ), generate

    return value


_value_of_leaf, _wide_value_of_leaf = _valuing(64), _valuing(128)
_bytes_of_leaf, _pairs_of_leaf = _valuing(8), _valuing(16)


def _lanes_of(context: Any, builder: Any, kind: Any, rows: Any, group: Any) -> Any:
    """Pointer to the row numbers of a group of lanes."""
    data = context.make_array(kind)(context, builder, rows).data
    return builder.gep(data, [builder.mul(group, _WORD(LANES))])


@intrinsic
def _step_down(  # type: ignore[no-untyped-def]
    typing, keys, seeds, flags, places, found, words, rows, group, level, shift
):
    """Move a group's nodes to the children that bit `shift` of their places selects.

    XORs into `found` the control bits of the left children that are passed.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        ciphers, nodes, chosen, wanted, passed = (
            _Vectors(context, builder, signature.args[i], args[i]) for i in range(5)
        )
        group, level, shift = args[7:]
        lanes = _lanes_of(context, builder, signature.args[6], args[6], group)
        corrections = _Rows(context, builder, signature.args[5], args[5], lanes)
        seed = nodes.load(group)
        parent = builder.xor(seed, builder.and_(chosen.load(group), corrections.load(level)))
        (left, left_flag), (right, right_flag) = (
            _split(builder, builder.xor(_encrypt(builder, seed, ciphers, _WORD(bit)), parent), bit)
            for bit in range(2)
        )
        turn = _bit(builder, wanted.load(group), _spread(builder, shift))
        nodes.store(group, _choose(builder, turn, right, left))
        chosen.store(group, _choose(builder, turn, right_flag, left_flag))
        passed.store(group, builder.xor(passed.load(group), builder.and_(turn, left_flag)))
        return context.get_dummy_value()

    return types.void(
        keys, seeds, flags, places, found, words, rows, types.int64, types.int64, types.int64
    ), generate


@intrinsic
def _count_before(  # type: ignore[no-untyped-def]
    typing, keys, seeds, flags, places, found, words, rows, group, level
):
    """Count the bits of a group's leaves before their places, plus the parity found on the path.

    The sum of a lane's two words in `found` is then odd if and only if the XOR of all is one.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        ciphers, nodes, chosen, wanted, passed = (
            _Vectors(context, builder, signature.args[i], args[i]) for i in range(5)
        )
        group, level = args[7:]
        lanes = _lanes_of(context, builder, signature.args[6], args[6], group)
        corrections = _Rows(context, builder, signature.args[5], args[5], lanes)
        seed = nodes.load(group)
        leaf = builder.xor(seed, builder.and_(chosen.load(group), corrections.load(level)))
        leaf = builder.xor(leaf, _encrypt(builder, seed, ciphers, _WORD(2)))
        # How many bits of each word are before the place, and then a mask of these bits: none if
        # the number is negative, and all from 64 on.
        place = builder.and_(wanted.load(group), _all(127, 127))
        bits = builder.sub(place, _all(0, 64))
        some = builder.shl(_all(1, 1), builder.and_(bits, _all(63, 63)))
        some = builder.or_(builder.sub(some, _all(1, 1)), _bit(builder, bits, _all(6, 6)))
        before = builder.and_(some, builder.not_(_bit(builder, bits, _all(63, 63))))
        name = f"llvm.ctpop.v{_VECTOR.count}i64"
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(_VECTOR, (_VECTOR,)), name
        )
        count = builder.call(function, (builder.and_(leaf, before),))
        left = builder.and_(passed.load(group), _all(1, 0))
        passed.store(group, builder.add(count, left))
        return context.get_dummy_value()

    return types.void(
        keys, seeds, flags, places, found, words, rows, types.int64, types.int64
    ), generate


@intrinsic
def _correct_level(  # type: ignore[no-untyped-def]
    typing, keys, seeds, flags, index, words, rows, group, level, shift
):
    """Write a level's correction words for a group of keys, and descend the paths of both parties.

    seeds: client and server of each group. flags: the server's; the client's are the opposite.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        ciphers, nodes, chosen, wanted = (
            _Vectors(context, builder, signature.args[i], args[i]) for i in range(4)
        )
        group, level, shift = args[6:]
        lanes = _lanes_of(context, builder, signature.args[5], args[5], group)
        corrections = _Rows(context, builder, signature.args[4], args[4], lanes)
        first = builder.shl(group, _WORD(1))
        turn = _bit(builder, wanted.load(group), _spread(builder, shift))
        children = []
        for party in range(2):
            seed = nodes.load(builder.add(first, _WORD(party)))
            children.append(
                [builder.xor(_encrypt(builder, seed, ciphers, _WORD(i)), seed) for i in range(2)]
            )
        left, right = (builder.xor(children[0][i], children[1][i]) for i in range(2))
        # The child off the path must become equal at both parties, including its control bit; the
        # control bits of the child on the path must differ.
        word = builder.and_(_choose(builder, turn, left, right), _all(-4, -1))
        word = builder.or_(word, builder.and_(builder.xor(left, builder.not_(turn)), _all(1, 0)))
        word = builder.or_(word, builder.and_(builder.xor(right, turn), _all(2, 0)))
        corrections.store(level, word)
        flag = chosen.load(group)
        for party, own in enumerate((builder.not_(flag), flag)):
            kept = _choose(builder, turn, children[party][1], children[party][0])
            kept = builder.xor(kept, builder.and_(own, word))
            nodes.store(builder.add(first, _WORD(party)), builder.and_(kept, _all(-4, -1)))
        control = _bit(builder, _lower(builder, kept), builder.and_(turn, _all(1, 1)))
        chosen.store(group, control)
        return context.get_dummy_value()

    return types.void(
        keys, seeds, flags, index, words, rows, types.int64, types.int64, types.int64
    ), generate


def _finishing(bits: int) -> Any:
    """Writes block `block` of a group's last corrections: pair `level` + `block` of its words.

    payload: what the leaves must become, as a difference of numbers of `bits` bits; as an XOR if
    `bits` is 0.
    """

    @intrinsic
    def finish(  # type: ignore[no-untyped-def]
        typing, keys, seeds, flags, payload, words, rows, group, level, block
    ):
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            ciphers, nodes, chosen = (
                _Vectors(context, builder, signature.args[i], args[i]) for i in range(3)
            )
            group, level, block = args[6:]
            lanes = _lanes_of(context, builder, signature.args[5], args[5], group)
            wanted, corrections = (
                _Rows(context, builder, signature.args[i], args[i], lanes) for i in (3, 4)
            )
            first = builder.shl(group, _WORD(1))
            cipher = builder.add(block, _WORD(2))
            values = []
            for party in range(2):
                seed = nodes.load(builder.add(first, _WORD(party)))
                values.append(builder.xor(_encrypt(builder, seed, ciphers, cipher), seed))
            word = wanted.load(block)
            if bits:
                word = _lanewise(builder, "sub", word, values[0], bits)
                word = _lanewise(builder, "add", word, values[1], bits)
                # Where the server adds the word, it counts negatively.
                flag = chosen.load(group)
                word = _lanewise(builder, "sub", builder.xor(word, flag), flag, bits)
            else:
                word = builder.xor(word, builder.xor(*values))
            corrections.store(builder.add(level, block), word)
            return context.get_dummy_value()

        return types.void(
            keys, seeds, flags, payload, words, rows, types.int64, types.int64, types.int64
        ), generate

    return finish


_finish_sum, _finish_xor, _finish_wide = _finishing(64), _finishing(0), _finishing(128)
_finish_bytes, _finish_pairs = _finishing(8), _finishing(16)


@compiled()
def vectors(count):  # type: ignore[no-untyped-def]
    """Uninitialized uint64 [count, 2 * LANES], aligned so that each vector is in one cache line."""
    size = count * 2 * LANES
    words = np.empty(size + _LINE_WORDS, np.uint64)
    first = (-words.ctypes.data // 8) % _LINE_WORDS
    return words[first : first + size].reshape(count, 2 * LANES)


@intrinsic
def _last_round(typing, states):  # type: ignore[no-untyped-def]
    """Apply AES's last round with an all-zero key to a vector: it substitutes bytes."""

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
    # With four equal columns, shifting the rows has no effect.
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

    keys: from `expand_keys`, for left and right children. seeds: [2**depth, 2 * LANES]. flags: same
    shape, all ones where a node's control bit is set. words: one vector of corrections per level.
    """
    for level in range(depth):
        grow_level(keys, seeds, flags, words, level, 1 << level)


@compiled()
def grow_level(keys, seeds, flags, words, level, nodes):  # type: ignore[no-untyped-def]
    """Replace the first `nodes` vectors, which lie at depth `level`, by twice as many: children.

    Vector v becomes vectors 2 v and 2 v + 1, the left and the right children of its lanes.
    """
    # Last node first, because children overwrite the positions of nodes after their parent.
    for node in range(nodes - 1, -1, -1):
        _grow_node(keys, seeds, flags, words, node, level)


@compiled()
def values_of_leaves(keys, seeds, flags, words, depth, bits, out):  # type: ignore[no-untyped-def]
    """Values of all leaves, out [blocks, LANES, leaves, 2], with the last correction applied.

    words: as in `grow_trees`, followed by one vector per block. bits: of the numbers that a block
    holds, 8, 16, 64 or 128; of the latter, the lower word is the first.
    """
    for block in range(out.shape[0]):
        for leaf in range(out.shape[2]):
            if bits == 64:
                _value_of_leaf(keys, seeds, flags, words, leaf, depth + block, block, out)
            elif bits == 128:
                _wide_value_of_leaf(keys, seeds, flags, words, leaf, depth + block, block, out)
            elif bits == 16:
                _pairs_of_leaf(keys, seeds, flags, words, leaf, depth + block, block, out)
            else:
                _bytes_of_leaf(keys, seeds, flags, words, leaf, depth + block, block, out)


@compiled()
def correct_paths(  # type: ignore[no-untyped-def]
    keys, client, server, index, payloads, ends, depth, bits, out
):
    """The dealer's correction words, for `depth` levels and each payload: out [n, 2 * depth + K W].

    client, server: roots [n, 2]. index: [n, words], the number of the special leaf, its lowest 64
    bits first. payloads: [K, n, W];
    payload k is what the node on the path at depth ends[k] must become: the client's share minus
    the server's, number by number of `bits` bits (8, 16, 64 or 128, the lower word first); or their
    XOR if `bits` is 0.
    """
    seeds, flags, turns = vectors(2 * _GROUPS), vectors(_GROUPS), vectors(_GROUPS)
    rows = np.empty(_GROUPS * LANES, np.int64)
    low, ones = ~np.uint64(3), ~np.uint64(0)
    blocks = payloads.shape[2] // 2
    for start in range(0, index.shape[0], rows.shape[0]):
        flags[:] = ones
        for k in range(rows.shape[0]):
            # Lanes without a key repeat the last one.
            i = rows[k] = min(start + k, index.shape[0] - 1)
            group, word = k // LANES, 2 * (k % LANES)
            for half in range(2):
                seeds[2 * group, word + half] = client[i, half] & low
                seeds[2 * group + 1, word + half] = server[i, half] & low
        for level in range(depth + 1):
            for k in range(ends.shape[0]):
                if ends[k] != level:
                    continue
                payload, first = payloads[k], depth + k * blocks
                for block in range(blocks):
                    for group in range(_GROUPS):
                        if bits == 64:
                            _finish_sum(keys, seeds, flags, payload, out, rows, group, first, block)
                        elif bits == 128:
                            _finish_wide(
                                keys, seeds, flags, payload, out, rows, group, first, block
                            )
                        elif bits == 16:
                            _finish_pairs(
                                keys, seeds, flags, payload, out, rows, group, first, block
                            )
                        elif bits == 8:
                            _finish_bytes(
                                keys, seeds, flags, payload, out, rows, group, first, block
                            )
                        else:
                            _finish_xor(keys, seeds, flags, payload, out, rows, group, first, block)
            place = depth - 1 - level
            if level < depth and (level == 0 or place % 64 == 63):
                for k in range(rows.shape[0]):
                    for half in range(2):
                        turns[k // LANES, 2 * (k % LANES) + half] = index[rows[k], place // 64]
            if level < depth:
                for group in range(_GROUPS):
                    _correct_level(keys, seeds, flags, turns, out, rows, group, level, place % 64)


@compiled()
def parities_before(  # type: ignore[no-untyped-def]
    keys, roots, words, places, depth, party, out
):
    """XOR shares of [index < place]: out uint8 [n, P] for places [n, P].

    roots [n, 2] and words [n, 2 * depth + 2] are a party's keys from `correct_paths` by XOR. A leaf
    holds 128 bits.
    """
    seeds, flags = vectors(_GROUPS), vectors(_GROUPS)
    ends, found = vectors(_GROUPS), vectors(_GROUPS)
    rows, low = np.empty(_GROUPS * LANES, np.int64), ~np.uint64(3)
    flat, shares, each = places.reshape(-1), out.reshape(-1), places.shape[1]
    for start in range(0, flat.shape[0], rows.shape[0]):
        flags[:] = np.uint64(0) - np.uint64(party)
        found[:] = np.uint64(0)
        for k in range(rows.shape[0]):
            # Lanes without a place repeat the last one.
            path = min(start + k, flat.shape[0] - 1)
            i = rows[k] = path // each
            group, word = k // LANES, 2 * (k % LANES)
            for half in range(2):
                seeds[group, word + half] = roots[i, half] & low
                ends[group, word + half] = flat[path]
        for level in range(depth):
            for group in range(_GROUPS):
                _step_down(
                    keys, seeds, flags, ends, found, words, rows, group, level, depth + 6 - level
                )
        for group in range(_GROUPS):
            _count_before(keys, seeds, flags, ends, found, words, rows, group, depth)
        for k in range(min(rows.shape[0], flat.shape[0] - start)):
            group, word = k // LANES, 2 * (k % LANES)
            shares[start + k] = (found[group, word] + found[group, word + 1]) & np.uint64(1)


@compiled()
def descend(keys, seeds, flags, nodes, found, words, rows, depth):  # type: ignore[no-untyped-def]
    """Walk LANES trees down from their roots, in the first vector of `seeds` and `flags`, in place.

    nodes: one vector, the number of each lane's node among those at `depth`. found: one vector that
    is overwritten. words: corrections [n, ...] of all keys. rows: the key of each lane.
    """
    for level in range(depth):
        _step_down(keys, seeds, flags, nodes, found, words, rows, 0, level, depth - 1 - level)
