"""Point functions: expanded keys add up to the table, for every place; keys look uniform."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.spec import CLIENT, ROLES, SERVER
from mergec.runtime.correlations.dpf import (
    LEAF_BITS,
    SALT_BYTES,
    Generator,
    HostKeys,
    Keys,
    added_wide,
    correct,
    correct_by_library,
    grow,
    key_words,
    new_salt,
    parities,
    parities_by_library,
    salt_of,
    sharing_bits,
    sharing_prefixes,
    sharing_words,
    signed,
    subtracted_wide,
    unsigned,
)
from mergec.runtime.correlations.prg import Prg, derive, new_seed
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.aes import LANES, vectors
from mergec.runtime.roles.inprocess import InProcessSession
from tests import decoder
from tests.protocols.harness import uniform_bytes

WORDS = 4

instructions = pytest.mark.skipif(not LANES, reason="this processor has no instructions for AES")


def random_words(*shape: int) -> np.ndarray:
    count = int(np.prod(shape))
    return Prg(new_seed()).read(8 * count).view(np.uint64).reshape(shape)


def tensor(words: np.ndarray) -> torch.Tensor:
    """Words as the tensors that keys are made of."""
    return signed(np.ascontiguousarray(words))


def keys_of(count: int, correct) -> tuple[Keys, Keys]:
    roots = tensor(random_words(count, 2)), tensor(random_words(count, 2))
    corrections = correct(roots)
    return Keys(roots[0], corrections), Keys(roots[1], corrections)


def on_host(keys: Keys) -> HostKeys:
    return HostKeys(unsigned(keys.roots), unsigned(keys.corrections))


def expanded(keys: Keys, depth: int, party: int, generator: Generator) -> np.ndarray:
    """A party's share of the tables, uint64 [n, 2**depth, WORDS]: the definition, word by word."""
    host = on_host(keys)
    seeds, bits = grow(host, depth, party, generator)
    rows = np.concatenate(list(generator.value(seeds) ^ seeds), axis=-1)
    rows = rows + bits[..., None] * host.corrections[:, None, -WORDS:]
    return rows if party == 0 else -rows


@pytest.mark.parametrize("depth", [1, 2, 5, 7])
def test_words_stand_in_their_place_and_zeros_elsewhere(depth: int) -> None:
    """Every place, with several keys each."""
    index = np.tile(np.arange(2**depth), 3)
    payload = random_words(len(index), WORDS).view(np.int64)
    generator = Generator(WORDS // 2)
    made = sharing_words(tensor(index), tensor(payload), depth, generator)
    client, server = keys_of(len(index), made)
    assert client.corrections.shape == (len(index), key_words(depth, WORDS))
    total = expanded(client, depth, 0, generator) + expanded(server, depth, 1, generator)
    wanted = np.zeros_like(total)
    wanted[np.arange(len(index)), index] = payload.view(np.uint64)
    assert np.array_equal(total, wanted)


@pytest.mark.parametrize("ends", [(5,), (5, 4, 2), (3, 0), (0, 1, 2, 3, 4, 5)])
def test_words_stand_at_each_prefix_and_zeros_elsewhere(ends: tuple[int, ...]) -> None:
    """Every place, and every node of the tree at the depths of the tables."""
    depth, index = 5, np.arange(2**5)
    payloads = random_words(len(ends), len(index), WORDS)
    generator = Generator(WORDS // 2)
    made = sharing_prefixes(tensor(index), tensor(payloads), ends, depth, generator)
    keys = keys_of(len(index), made)
    assert keys[0].corrections.shape == (len(index), key_words(depth, WORDS * len(ends)))
    for k, end in enumerate(ends):
        total = np.zeros((len(index), 2**end, WORDS), np.uint64)
        for party, key in enumerate(map(on_host, keys)):
            place = 2 * depth + WORDS * k
            seeds, bits = grow(key, end, party, generator)
            rows = np.concatenate(list(generator.value(seeds) ^ seeds), axis=-1)
            rows += bits[..., None] * key.corrections[:, None, place : place + WORDS]
            total += -rows if party else rows
        wanted = np.zeros_like(total)
        wanted[index, index >> (depth - end)] = payloads[k]
        assert np.array_equal(total, wanted)


def test_corrections_of_prefixes_are_uniform_and_do_not_repeat_each_other() -> None:
    """Also together: the sum and the XOR of any two words of a key."""
    generator, index = Generator(2), np.full(4096, 5)
    payloads = np.broadcast_to(np.arange(3)[:, None, None], (3, 4096, WORDS)).copy()
    made = sharing_prefixes(tensor(index), tensor(payloads), (4, 3, 1), 4, generator)
    (key, _) = keys_of(4096, made)
    columns = unsigned(key.corrections).T
    for i, one in enumerate(columns):
        for other in columns[:i]:
            for word in (one, one ^ other, one + other):
                assert abs(uniform_bytes([torch.from_numpy(word.view(np.int64).copy())])) < 6.5


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_parities_tell_whether_the_index_is_before_every_place(depth: int) -> None:
    size = LEAF_BITS << depth
    index = np.arange(size)
    generator = Generator(1)
    keys = keys_of(size, sharing_bits(tensor(index), depth, generator))
    places = np.broadcast_to(np.arange(size), (size, size)).copy()
    found = [parities(key, tensor(places), depth, p, generator) for p, key in enumerate(keys)]
    assert np.array_equal((found[0] ^ found[1]).numpy(), index[:, None] < places)


def test_corrections_are_uniform_whatever_the_place_and_the_payload_are() -> None:
    generator = Generator(2)
    for place, entry in ((0, 0), (0, -1), (127, 1), (64, 2**40)):
        index, payload = np.full(4096, place), np.full((4096, WORDS), entry)
        (key, _) = keys_of(4096, sharing_words(tensor(index), tensor(payload), 7, generator))
        for word in range(key.corrections.shape[1]):
            assert abs(uniform_bytes([key.corrections[:, word].clone()])) < 5, (
                f"word {word}, place {place}"
            )


def test_an_expanded_share_is_uniform_at_the_special_place_too() -> None:
    index, payload = np.full(4096, 3), np.zeros((4096, WORDS), np.int64)
    generator = Generator(2)
    keys = keys_of(4096, sharing_words(tensor(index), tensor(payload), 3, generator))
    for party, key in enumerate(keys):
        for leaf in (3, 4):
            words = expanded(key, 3, party, generator)[:, leaf].copy().view(np.int64)
            assert abs(uniform_bytes([torch.from_numpy(words)])) < 5


def test_each_call_takes_fresh_roots_and_both_parties_get_the_same_corrections() -> None:
    simulation = Simulation()
    index, generator = np.arange(8), Generator(1)
    seen = []
    for _ in range(2):
        dealer, client, server = (
            ctx.deal_keys(8, key_words(3, 2), sharing_bits(tensor(128 * index), 3, generator))
            for ctx in (simulation.contexts[2], simulation.contexts[0], simulation.contexts[1])
        )
        assert dealer is None
        assert torch.equal(client.corrections, server.corrections)
        seen += [client.roots.numpy(), server.roots.numpy()]
    assert len(np.unique(np.concatenate(seen), axis=0)) == 4 * 8
    assert simulation.dealt == 2 * 2 * 8 * 8 * key_words(3, 2)
    assert ShapeContext().deal_keys(1, 1, sharing_bits(tensor(index), 3, generator)) is None


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_library_tells_the_same(depth: int) -> None:
    """The definition again, by the code for processors without AES instructions."""
    size = LEAF_BITS << depth
    index, generator = np.arange(size), Generator(1)
    payload = np.zeros((size, 2), np.uint64)
    payload[index, index % LEAF_BITS // 64] = np.uint64(1) << (index % 64).astype(np.uint64)
    roots = random_words(size, 2), random_words(size, 2)
    corrections = np.empty((size, key_words(depth, 2)), np.uint64)
    leaf, ends = index // LEAF_BITS, np.array([depth])
    correct_by_library(roots, leaf, payload[None], ends, depth, generator, 0, corrections)
    places = np.broadcast_to(index, (size, size)).copy()
    found = np.empty((2, size, size), np.uint8)
    for party, root in enumerate(roots):
        keys = HostKeys(root, corrections)
        parities_by_library(keys, places, depth, party, generator, found[party])
    assert np.array_equal(found[0] ^ found[1], index[:, None] < places)


@instructions
@pytest.mark.parametrize("count", [1, 3, 131])
@pytest.mark.parametrize("depth", [0, 1, 7])
@pytest.mark.parametrize("bits", [128, 64, 16, 8, 0])
def test_instructions_and_library_make_the_same_corrections(
    bits: int, depth: int, count: int
) -> None:
    generator = Generator(2 if bits else 1)
    roots = random_words(count, 2), random_words(count, 2)
    index = random_words(count).view(np.int64) & (2**depth - 1)
    payloads = random_words(3, count, 2 * generator.blocks)
    ends = np.array([depth, depth // 2, 0])
    words = tuple(map(tensor, roots))
    made = correct(words, tensor(index), tensor(payloads), ends.tolist(), depth, generator, bits)
    expected = np.empty(made.shape, np.uint64)
    correct_by_library(roots, index, payloads, ends, depth, generator, bits, expected)
    assert np.array_equal(unsigned(made), expected)


@instructions
@pytest.mark.parametrize("count", [1, 3, 131])
@pytest.mark.parametrize("depth", [0, 1, 8])
@pytest.mark.parametrize("party", [CLIENT, SERVER])
def test_instructions_and_library_find_the_same_parities(
    party: int, depth: int, count: int
) -> None:
    """Keys without a table, at places in each half and at both ends."""
    generator, size = Generator(1), LEAF_BITS << depth
    keys = HostKeys(random_words(count, 2), random_words(count, key_words(depth, 2)))
    places = random_words(count, 5).view(np.int64) & (size - 1)
    places[:, :3] = 0, size // 2, size - 1
    own = Keys(*map(tensor, keys))
    found = parities(own, tensor(places), depth, party, generator).numpy()
    expected = np.empty_like(found)
    parities_by_library(keys, places, depth, party, generator, expected)
    assert np.array_equal(found, expected)


@instructions
def test_vectors_begin_at_a_line_of_the_cache() -> None:
    kept = [vectors(count) for count in range(1, 40)]
    assert all(some.ctypes.data % 64 == 0 for some in kept)
    assert [some.shape for some in kept] == [(count, 2 * LANES) for count in range(1, 40)]


def test_keys_of_the_ciphers_follow_from_the_salt() -> None:
    """Each name and each salt has a key of its own; the same ones give the same."""
    seeds = random_words(50, 2)
    salts = [b"", bytes(SALT_BYTES), new_salt(), new_salt()]
    made = [Generator(2, salt) for salt in salts]
    blocks = [[*one.children(seeds), *one.value(seeds)] for one in made]
    assert len({block.tobytes() for some in blocks for block in some}) == 4 * len(salts)
    again = Generator(2, salts[2])
    assert np.array_equal(again.value(seeds), made[2].value(seeds))
    assert np.array_equal(again.round_keys, made[2].round_keys)


def test_a_session_that_repeats_has_its_salt_again() -> None:
    one, other = new_seed(), new_seed()
    assert salt_of(one) == salt_of(one)
    assert len({salt_of(one), salt_of(other), derive(one, "other")[:SALT_BYTES]}) == 3
    assert len(salt_of(one)) == len(new_salt()) == 16


def test_numbers_of_two_words_carry_and_borrow() -> None:
    ring, count = 1 << 128, 200
    draw = np.random.default_rng(3)
    edges = [0, 1, 2**64 - 1, 2**64, 2**127, ring - 1]
    numbers = edges + [int.from_bytes(draw.bytes(16), "little") for _ in range(count)]
    for one in edges:
        pairs = [(one, other) for other in numbers]
        left, right = (_two_words([pair[k] for pair in pairs]) for k in (0, 1))
        for found, sign in ((added_wide(left, right), 1), (subtracted_wide(left, right), -1)):
            wanted = [(a + sign * b) % ring for a, b in pairs]
            assert np.array_equal(found, _two_words(wanted))


def _two_words(numbers: list[int]) -> np.ndarray:
    return np.array([[n % 2**64, n >> 64] for n in numbers], np.uint64)


def test_parties_with_other_salts_get_other_tables() -> None:
    index, payload = np.arange(8), random_words(8, WORDS).view(np.int64)
    mine, theirs = (Generator(WORDS // 2, new_salt()) for _ in range(2))
    keys = keys_of(8, sharing_words(tensor(index), tensor(payload), 3, mine))
    for other, good in ((mine, True), (theirs, False)):
        total = expanded(keys[0], 3, 0, mine) + expanded(keys[1], 3, 1, other)
        assert (np.count_nonzero(total) == 8 * WORDS) == good


def test_the_roles_of_a_session_share_a_fresh_salt() -> None:
    salts = []
    for _ in range(2):
        session = InProcessSession({role: decoder.program(role) for role in ROLES})
        found = {executor.context.salt for executor in session.executors.values()}
        assert [len(salt) for salt in found] == [SALT_BYTES]
        salts += found
        with session:
            session.step([5, 1], 0)
    assert salts[0] != salts[1]


def test_corrections_of_another_length_are_our_mistake() -> None:
    dealer = Simulation().contexts[2]
    with pytest.raises(ValueError, match="keys have 9 words, not"):
        dealer.deal_keys(8, 9, sharing_bits(torch.arange(8), 3, Generator(1)))
