"""Faithful truncation: at most one unit off, and never a wrap."""

from __future__ import annotations

import pytest
import torch

from runtime.protocols.truncate import Truncation, top_bit, truncate, truncate_cost
from runtime.simulate import Simulation
from runtime.values import logical_shift
from tests.protocols.harness import integers, run, words

EDGE = 2**62 - 1


@pytest.mark.parametrize("shift", [1, 2, 13, 16, 32, 47, 62])
def test_within_one_unit_of_the_floor(shift: int) -> None:
    edges = torch.tensor([0, 1, -1, EDGE, -EDGE, 2**shift, -(2**shift), 2**shift - 1, EDGE - 1])
    values = torch.cat([edges.clamp(-EDGE, EDGE), words(20_000, -EDGE, EDGE)])
    simulation = Simulation()
    shares = integers(simulation, values)
    result, cost = run(simulation, lambda ctx, p: truncate(ctx, shares[p].share, shift))
    error = result - (values >> shift)
    assert set(error.unique().tolist()) <= {0, 1}
    assert cost == truncate_cost(len(values), shift)


def test_every_small_value_under_every_small_mask() -> None:
    """Exhaustive: all x below 2**8 in size, all masks of one low byte and edges of the high one."""
    shift = 4
    x = torch.arange(-256, 256)[:, None]
    low = torch.arange(256)[None, :]
    for high in (0, 1, 0x3F, 0x40, 0x7F, -0x80, -0x7F, -0x41, -0x40, -1):
        mask = (high << 56) + low
        opened = x + (1 << 62) + mask
        parts = Truncation(opened, shift)
        result = parts.base - logical_shift(mask, shift) + parts.wrap * top_bit(mask)
        assert set((result - (x >> shift)).unique().tolist()) <= {0, 1}


def test_no_wrap_among_many_large_values() -> None:
    """CrypTen's local truncation fails here about once in two."""
    values = torch.full((500_000,), EDGE)
    values[::2] = -EDGE
    simulation = Simulation()
    shares = integers(simulation, values)
    result, _ = run(simulation, lambda ctx, p: truncate(ctx, shares[p].share, 16))
    assert bool(((result - (values >> 16)).abs() <= 1).all())


def test_is_unbiased() -> None:
    values = torch.full((200_000,), 3 * 2**14)
    simulation = Simulation()
    shares = integers(simulation, values)
    result, _ = run(simulation, lambda ctx, p: truncate(ctx, shares[p].share, 16))
    # The mean of 200,000 coin flips with probability 3/4, within five standard deviations.
    assert abs(result.double().mean() - 0.75) < 5 * (0.1875 / 200_000) ** 0.5


def test_negative_shift_multiplies_locally() -> None:
    simulation = Simulation()
    shares = integers(simulation, torch.tensor([3, -5]))
    result, cost = run(simulation, lambda ctx, p: truncate(ctx, shares[p].share, -4))
    assert result.tolist() == [48, -80]
    assert cost.rounds == cost.online == cost.offline == 0
