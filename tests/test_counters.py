"""Keys of counters: tallies are histograms of the places, anywhere; keys look uniform."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergec.runtime.correlations import counters
from mergec.runtime.correlations.counters import Counters
from mergec.runtime.correlations.dpf import Generator, Keys, new_salt, signed
from mergec.runtime.correlations.prg import Prg, new_seed
from mergec.runtime.kernels.aes import LANES
from tests.protocols.harness import uniform_bytes

KINDS = [
    Counters(8, 4),
    Counters(8, 8),
    Counters(8, 9),
    Counters(8, 16),
    Counters(16, 3),
    Counters(16, 7),
    Counters(16, 16),
]


def random_words(*shape: int) -> np.ndarray:
    count = int(np.prod(shape))
    return Prg(new_seed()).read(8 * count).view(np.uint64).reshape(shape)


def keys_of(kind: Counters, places: np.ndarray, generator: Generator) -> list[Keys]:
    roots = tuple(signed(random_words(len(places), 2)) for _ in range(2))
    corrections = kind.counting(torch.from_numpy(places), generator)(roots)
    assert corrections.shape == (len(places), kind.words)
    assert kind.dealt_bytes * len(places) == 2 * corrections.numel() * corrections.element_size()
    return [Keys(root, corrections) for root in roots]


def tallied(kind, keys, first, rows, shape, generator) -> np.ndarray:
    client, server = (
        kind.tally(key, torch.from_numpy(first), torch.from_numpy(rows), shape, party, generator)
        for party, key in enumerate(keys)
    )
    return (client + server).numpy().view(kind.dtype)


def histogram(kind, places, first, rows, shape) -> np.ndarray:
    """The definition: entry p counts the keys whose place is first - p."""
    found = np.zeros(shape, kind.dtype)
    entries = (first - places) % (1 << kind.width)
    for row, entry in zip(rows, entries, strict=True):
        if entry < shape[1]:
            found[row, entry] += 1
    return found


@pytest.fixture(params=["instructions", "library"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "library":
        monkeypatch.setattr(counters, "LANES", 0)
    elif not LANES:
        pytest.skip("this processor has no instructions for AES")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("way")
def test_tallies_are_histograms_of_any_part_of_the_table(kind: Counters) -> None:
    size = 1 << kind.width
    draw = np.random.default_rng(size)
    places = np.arange(size) if size <= 512 else draw.integers(0, size, 97)
    places[:2] = 0, size - 1
    rows = draw.integers(0, 3, len(places))
    generator = Generator(1, new_salt())
    keys = keys_of(kind, places, generator)
    first = draw.integers(-size, 2 * size, len(places))
    counts = {1, 2, kind.leaf, kind.leaf + 1, 255, 256, 257, 384, 600, size}
    for count in sorted(each for each in counts if each <= size):
        found = tallied(kind, keys, first, rows, (3, count), generator)
        assert np.array_equal(found, histogram(kind, places, first, rows, (3, count)))


@pytest.mark.parametrize("kind", [Counters(8, 6), Counters(16, 5)], ids=str)
@pytest.mark.usefixtures("way")
def test_every_place_is_counted_from_every_public_number(kind: Counters) -> None:
    size = 1 << kind.width
    places, first = (x.reshape(-1) for x in np.meshgrid(np.arange(size), np.arange(size)))
    rows = np.arange(len(places))
    generator = Generator(1)
    keys = keys_of(kind, places, generator)
    for count in (1, 5, size - 1, size):
        found = tallied(kind, keys, first, rows, (len(places), count), generator)
        assert np.array_equal(found, histogram(kind, places, first, rows, (len(places), count)))


@pytest.mark.usefixtures("way")
def test_counters_that_are_added_do_not_carry_into_each_other() -> None:
    """255 keys at one place and 255 at the next one: both counters of 8 bits are full."""
    kind, generator = Counters(8, 8), Generator(1)
    places = np.repeat([7, 8], 255)
    keys, zeros = keys_of(kind, places, generator), np.zeros(510, np.int64)
    found = tallied(kind, keys, zeros, zeros, (1, 256), generator)[0]
    assert found[-7 % 256] == found[-8 % 256] == 255
    assert found.sum(dtype=np.int64) == 510


def test_corrections_and_shares_are_uniform_whatever_the_place_is() -> None:
    kind, generator = Counters(8, 16), Generator(1)
    for place in (0, 1, 2**16 - 1, 12_345):
        keys = keys_of(kind, np.full(4096, place), generator)
        for word in range(kind.words):
            column = keys[0].corrections[:, word].clone()
            assert abs(uniform_bytes([column])) < 5, f"word {word}, place {place}"
        for party, key in enumerate(keys):
            firsts, rows = torch.full((4096,), place), torch.arange(4096)
            share = kind.tally(key, firsts, rows, (4096, 2), party, generator)
            for entry in range(2):
                column = share[:, entry].clone()
                assert abs(uniform_bytes([column])) < 5, f"entry {entry}, place {place}"


def test_tables_smaller_than_a_leaf_raise() -> None:
    with pytest.raises(ValueError, match="a leaf has 16 counters of 8 bits"):
        Counters(8, 3)
