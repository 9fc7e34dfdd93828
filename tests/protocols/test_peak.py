"""The near maximum of rows: all small rows, ties, masked entries and rows of any length."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.peak import GROUP, peak, peak_cost
from tests.protocols.harness import run, words

UNIT = 2**16


def _peak(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    simulation = Simulation()
    # The parties' shares are modulo 2**32, as those of a window are.
    shares = [s.share.to(torch.int32) for s in simulation.share(values, 0)]
    result, cost = run(simulation, lambda ctx, p: peak(ctx, shares[p], valid))
    assert cost == peak_cost(valid)
    longest, levels = int(valid.sum(1).max()), 0
    while GROUP**levels < longest:
        levels += 1
    assert cost.rounds == 3 * levels
    return result.long()


def _check(values: torch.Tensor, valid: torch.Tensor) -> None:
    exact = torch.where(valid, values, -(2**62)).max(1).values
    below = exact - _peak(values, valid)
    assert bool((below >= 0).all()) and bool((below < 2 * UNIT).all())


def test_every_order_of_four_values_with_ties() -> None:
    rows = torch.tensor(list(itertools.product((-3, 0, 0.5, 2), repeat=4)))
    _check((rows * UNIT).long(), torch.ones(rows.shape, dtype=torch.bool))


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 64, 129, 257, 1000])
def test_rows_of_any_length(length: int) -> None:
    values = words(20 * length, -(2**29), 2**29, seed=length).reshape(20, length)
    values[0] = values[0, 0]
    values[1] = torch.arange(length) * 1000
    values[2] = -values[1]
    _check(values, torch.ones(values.shape, dtype=torch.bool))


def test_differences_up_to_the_edge_of_the_range() -> None:
    edge = 16_383 * UNIT
    rows = torch.tensor([[edge, -edge, 0], [-edge, edge, edge - 1], [-edge, -edge, -edge]])
    _check(rows, torch.ones(rows.shape, dtype=torch.bool))


def test_masked_entries_are_left_out() -> None:
    values = words(40 * 37, -(2**29), 2**29).reshape(40, 37)
    valid = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    valid[:, 5] = True
    valid[3] = False
    valid[3, 36] = True
    _check(values, valid)
    _check(values, torch.ones(40, 37, dtype=torch.bool).tril())
