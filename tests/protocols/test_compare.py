"""Comparison by digit tables: exhaustive on small domains, adversarial on the whole window."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.compare import (
    WORDS,
    less_than,
    less_than_cost,
    maximum,
    maximum_cost,
    open_window,
    open_window_cost,
    relu_below,
    relu_below_cost,
    take_window,
)
from mergec.runtime.protocols.opening import Cut
from tests.protocols.harness import integers, run, words


def test_all_pairs_of_small_values_and_thresholds() -> None:
    values = torch.arange(-128, 128)
    thresholds = values.tolist()
    simulation = Simulation()
    shares = integers(simulation, values)

    def protocol(ctx, p):
        window = yield from open_window(ctx, take_window(shares[p].share, 0))
        flags = yield from less_than(ctx, window, thresholds)
        return flags

    result, cost = run(simulation, protocol)
    assert torch.equal(result, (values[None, :] < values[:, None]).long())
    assert cost == open_window_cost(256) + less_than_cost(256, 256)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_random_and_edge_values_on_the_whole_window(dtype: torch.dtype) -> None:
    thresholds = [0, 1, -1, 255, 256, -256, 65536, 2**24, -(2**24), 2**30 - 1, -(2**30)]
    near = torch.tensor([t + d for t in thresholds for d in (-1, 0, 1)])
    values = torch.cat([near.clamp(-(2**30), 2**30 - 1), words(100_000, -(2**30), 2**30)])
    simulation = Simulation()
    shares = integers(simulation, values)

    def protocol(ctx, p):
        window = yield from open_window(ctx, take_window(shares[p].share, 0))
        flags = yield from less_than(ctx, window, thresholds, dtype)
        return flags

    result, cost = run(simulation, protocol)
    expected = torch.stack([(values < t) for t in thresholds]).to(dtype)
    assert torch.equal(result, expected)
    assert cost.offline == 256 * len(values) + WORDS * dtype.itemsize * len(thresholds) * len(
        values
    )


def test_window_of_high_bits_is_exact_up_to_one_unit() -> None:
    values = words(50_000, -(2**61), 2**61)
    simulation = Simulation()
    shares = integers(simulation, values)
    drop = 31
    total = sum(take_window(shares[p].share, drop) for p in (0, 1))
    error = total.long() - (values >> drop)
    # A borrow from the dropped bits costs one unit; modulo 2**32 the top is right.
    assert set(error.unique().tolist()) <= {0, -1}


def test_only_windows_that_lie_within_the_word() -> None:
    """Both ways to take a window: bits dropped before the opening, or after it."""
    share = words(3, -(2**63), 2**63 - 1)
    for drop in (0, 32):
        assert take_window(share, drop).dtype is torch.int32
        assert Cut(share, drop, drop).drop == drop
    for drop in (-1, 33):
        with pytest.raises(ValueError, match=f"the lowest {drop}"):
            take_window(share, drop)
        with pytest.raises(ValueError, match=f"begins at bit {drop}"):
            Cut(share, drop, drop)


def test_relu_below_gives_the_negative_part() -> None:
    values = torch.cat(
        [torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)]), words(50_000, -(2**31), 2**31)]
    )
    simulation = Simulation()
    shares = integers(simulation, values)

    def protocol(ctx, p):
        window = yield from open_window(ctx, take_window(shares[p].share, 0))
        part = yield from relu_below(ctx, window)
        return part

    result, cost = run(simulation, protocol)
    assert torch.equal(result.long(), values.clamp(max=0))
    assert cost == open_window_cost(len(values)) + relu_below_cost(len(values))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 64, 129])
def test_maximum_of_rows_of_any_length(length: int) -> None:
    values = words(50 * length, -(2**29), 2**29, seed=length).reshape(50, length)
    values[0] = values[0, 0]
    values[1] = torch.arange(length)
    simulation = Simulation()
    shares = integers(simulation, values)
    valid = torch.ones(values.shape, dtype=torch.bool)
    result, cost = run(
        simulation, lambda ctx, p: maximum(ctx, take_window(shares[p].share, 0), valid)
    )
    assert torch.equal(result.long(), values.max(1).values)
    assert cost == maximum_cost(valid)
    assert cost.rounds == 2 * (length - 1).bit_length()


def test_maximum_leaves_masked_entries_out() -> None:
    values = words(40 * 37, -(2**29), 2**29).reshape(40, 37)
    valid = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    valid[:, 5] = True
    simulation = Simulation()
    shares = integers(simulation, values)
    result, cost = run(
        simulation, lambda ctx, p: maximum(ctx, take_window(shares[p].share, 0), valid)
    )
    expected = torch.where(valid, values, -(2**40)).max(1).values
    assert torch.equal(result.long(), expected)
    assert cost == maximum_cost(valid)
