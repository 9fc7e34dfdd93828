"""The largest of a row: every row of small keys, ties, ends, and rows up to the longest."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergec.runtime.core.spec import Cost
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.opening import Cut
from mergec.runtime.protocols.saturate import function_input
from mergec.runtime.protocols.top_k import LONGEST, top_k, top_k_cost
from tests.protocols.harness import integers, uniform_bytes, words

LOWEST, TOP = -(2**30) + 1, 2**30 - 1
FRAC = 16


def _top_k(keys: torch.Tensor, k: int, simulation: Simulation) -> torch.Tensor:
    shares = [share.share.to(torch.int32) for share in integers(simulation, keys)]
    simulation.cost = Cost()
    client, server, dealer = simulation.run(lambda ctx, p: top_k(ctx, Cut(shares[p]), k, FRAC))
    assert dealer.shape == client.shape == keys.shape
    assert simulation.cost == top_k_cost(*keys.shape)
    return client + server


def _wanted(keys: torch.Tensor, k: int) -> torch.Tensor:
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(keys).scatter(-1, order[:, :k], 1 << FRAC)


def _check(keys: torch.Tensor, *counts: int) -> None:
    for k in counts:
        assert torch.equal(_top_k(keys, k, Simulation()), _wanted(keys, k))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_row_of_small_keys(size: int) -> None:
    """All orders and all ties; of equal keys the first ones are chosen."""
    keys = torch.tensor(list(itertools.product(range(-1, 3), repeat=size)))
    _check(keys, *range(1, size + 1))


@pytest.mark.parametrize("size", [2, 7, 8, 9, 60, 64, 128, LONGEST])
def test_random_rows_and_ties(size: int) -> None:
    keys = words(4 * size, LOWEST, TOP + 1, seed=size).reshape(4, size)
    keys[1] = words(size, -2, 3, seed=size)
    keys[2, size // 2 :] = keys[2].max()
    keys[3] = -7
    _check(keys, 1, size // 2, size - 1, size)


def test_ends_and_neighbours() -> None:
    """The largest differences that fit, differences of one unit, and of one byte's borrow."""
    rows = [
        [LOWEST, TOP, LOWEST, TOP],
        [TOP, TOP - 1, TOP, TOP - 2],
        [0, -1, 1, 0],
        [255, 256, 257, 256],
        [-(2**16), -(2**16) - 1, -(2**16) + 1, -(2**24)],
        [LOWEST] * 4,
    ]
    for turn in range(4):
        _check(torch.tensor(rows).roll(turn, 1), 1, 2, 3)


def test_every_mask_of_a_rank() -> None:
    """A rank is looked up modulo the power of two above it, whatever the mask's upper bits."""
    keys = words(6 * 4096, -99, 99).reshape(4096, 6)
    _check(keys, 2)


@pytest.mark.parametrize("frac", [16, 17, 32, 48])
@pytest.mark.parametrize("exact", [False, True])
def test_windows_of_finer_numbers(frac: int, exact: bool) -> None:
    """Numbers further apart than what a window loses, with either rounding."""
    order = torch.stack([torch.randperm(9) for _ in range(200)])
    values = (order * 2 - 9).double() * 2.0**-16 + 3
    simulation = Simulation(exact=exact)
    shares = simulation.share(values, frac)
    client, server, _ = simulation.run(
        lambda ctx, p: top_k(ctx, function_input(ctx, shares[p]), 4, FRAC)
    )
    assert torch.equal(client + server, _wanted(order, 4))


@pytest.mark.parametrize("exact", [False, True])
def test_near_ties_go_either_way(exact: bool) -> None:
    """Numbers closer than a window tells apart: any may be chosen, and always exactly one."""
    values = torch.tensor([[3.0, 3.0 + 2.0**-20]], dtype=torch.float64).repeat(400, 1)
    simulation = Simulation(exact=exact)
    shares = simulation.share(values, 32)
    client, server, _ = simulation.run(
        lambda ctx, p: top_k(ctx, function_input(ctx, shares[p]), 1, FRAC)
    )
    chosen = (client + server) >> FRAC
    assert bool((chosen.sum(-1) == 1).all())
    assert 0 < int(chosen[:, 0].sum()) < 400


def test_messages_are_uniform_and_tell_nothing_by_their_shape() -> None:
    shapes = []
    for secret in (0, TOP, LOWEST):
        simulation = Simulation(record=True)
        _top_k(torch.full((64, 60), secret), 8, simulation)
        assert abs(uniform_bytes(simulation.transcript)) < 5
        shapes.append([(t.dtype, tuple(t.shape)) for t in simulation.transcript])
    assert shapes[0] == shapes[1] == shapes[2]
