"""Kernels of ranks against their definitions, including the ends of the word types."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.ranks import Pairs

TYPES = [torch.int16, torch.int32]


def _pairs(size: int) -> Pairs:
    first, second = torch.triu_indices(size, size, 1, dtype=torch.int32).numpy()
    return Pairs(first, second, size, 1 << (size - 1).bit_length())


def _extreme(dtype: torch.dtype, count: int) -> torch.Tensor:
    limits = torch.iinfo(dtype)
    words = torch.tensor([limits.min, limits.max, -1, 0, 1, limits.min + 1], dtype=dtype)
    return words.repeat(-(-count // len(words)))[:count]


@pytest.mark.parametrize("dtype", TYPES)
def test_differences_do_not_wrap(dtype: torch.dtype) -> None:
    pairs, words = _pairs(7), _extreme(dtype, 7)
    expected = [int(a) - int(b) for a, b in itertools.combinations(words, 2)]
    assert pairs.differences(words).tolist() == expected


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [2, 3, 16])
def test_a_row_has_its_one_and_its_words_at_the_mask(dtype: torch.dtype, size: int) -> None:
    pairs = _pairs(size)
    words = _extreme(dtype, size)
    for start in range(-128, 128, size):
        mask = (torch.arange(size) + start).to(torch.int8)
        rows = pairs.one_hot(mask, words, -words)
        assert rows.dtype is dtype and rows.shape == (size, 3, pairs.entries)
        for i, payload in itertools.product(range(size), range(3)):
            expected = torch.zeros(pairs.entries, dtype=dtype)
            expected[int(mask[i]) % pairs.entries] = (torch.ones_like(words), words, -words)[
                payload
            ][i]
            assert torch.equal(rows[i, payload], expected)


@pytest.mark.parametrize("size", [2, 5, 64])
def test_every_member_gets_the_number_of_comparisons_that_it_lost(size: int) -> None:
    pairs, rng = _pairs(size), np.random.default_rng(size)
    less = rng.integers(0, 2, len(pairs.first)).astype(np.int8)
    split = rng.integers(-128, 128, len(less)).astype(np.int8)
    expected = np.zeros(size, np.int64)
    for first, second, lost in zip(pairs.first, pairs.second, less, strict=True):
        expected[first if lost else second] += 1
    simulation, masks = Simulation(), {}

    def protocol(ctx, p):
        masks[p] = ctx.mask((size,), torch.int8)
        mine = torch.from_numpy((split, less - split, less)[p])
        return (yield from pairs.open_ranks(ctx, mine.to("meta") if p == 2 else mine, masks[p]))

    client, server, _ = simulation.run(protocol)
    assert torch.equal(client, server)
    assert torch.equal((client - masks[2]).long() & 0xFF, torch.from_numpy(expected))
    assert (simulation.cost.rounds, simulation.cost.online) == (1, 2 * size)
