"""Reciprocals and inverse square roots over every octave in their valid range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergec.runtime.core.values import logical_shift
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.power import (
    Octaves,
    Power,
    _choose_cpu,
    _positions,
    level_tables,
    power,
    power_cost,
)
from mergec.runtime.protocols.truncate import Truncation
from tests.protocols.harness import integers, run, words


@pytest.mark.parametrize(
    ("spec", "tolerance"),
    [
        (Power(-1.0, 17, 16, 29), 1e-5),
        (Power(-1.0, 16, 6, 33), 2e-3),
        (Power(-0.5, 37.17, 12, 53), 3e-5),
        (Power(-0.5, 29.2, 0, 40), 2e-5),
    ],
)
def test_relative_error_over_all_octaves(spec: Power, tolerance: float) -> None:
    edges = [2**j + d for j in range(spec.low, spec.high + 1) for d in (-1, 0, 1)]
    edges = [v for v in edges if v >= 2**spec.low]
    spread = 2.0 ** torch.linspace(spec.low + 0.01, spec.high + 0.99, 3000, dtype=torch.float64)
    values = torch.cat([spread.to(torch.int64), torch.tensor(edges)])
    simulation = Simulation()
    shares = integers(simulation, values)
    result, cost = run(simulation, lambda ctx, p: power(ctx, shares[p].share, spec))
    exact = (values.double() * 2.0**-spec.v_frac) ** spec.exponent
    relative = (result.double() * 2.0**-spec.out_frac / exact - 1).abs()
    assert relative.max() < tolerance
    assert cost == power_cost(spec, len(values))


def test_octaves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="outside 0 to 53"):
        Power(-1.0, 16, 0, 60)
    with pytest.raises(ValueError, match="span too much"):
        Power(-1.0, 16, 0, 40)


@pytest.mark.parametrize("spec", [Power(-1.0, 16, 6, 33), Power(-0.5, 29.2, 0, 40)])
def test_beyond_the_octaves_nothing_is_larger_than_the_largest_result(spec: Power) -> None:
    """Zero, negative and too large numbers: the result is wrong, but overflows nothing later."""
    beyond = [0, -1, -(2**spec.low), -(2**50), 2 ** (spec.high + 2), 2**62 - 1, -(2**62)]
    values = torch.tensor(beyond).repeat(200)
    simulation = Simulation()
    shares = integers(simulation, values)
    result, _ = run(simulation, lambda ctx, p: power(ctx, shares[p].share, spec))
    largest = (2.0**spec.low * 2.0**-spec.v_frac) ** spec.exponent * 2.0**spec.out_frac
    assert result.double().abs().max() < 1.25 * largest


@pytest.mark.parametrize(
    "spec", [Octaves(0, 9, 16, 2, level_tables(np.sqrt, 2)), Power(-1.0, 17, 16, 45).octaves]
)
def test_positions_are_shifted_words(spec: Octaves) -> None:
    """Equal bit for bit; shifts up for the lowest levels and down for the others."""
    some = torch.cat([words(500, -(2**63), 2**63 - 1), torch.tensor([0, -1, -(2**63)])])
    expected = [
        logical_shift(some, drop) if drop >= 0 else some << -drop for drop in spec.drops.tolist()
    ]
    expected = torch.stack(expected, -1).reshape(-1)
    assert torch.equal(_positions(some[:, None], spec), expected)
    assert torch.equal(_positions(some[:, None].repeat(1, spec.levels), spec), expected)


@pytest.mark.parametrize("at_client", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_the_level_is_chosen_as_words_of_tensors_say(levels: int, at_client: bool) -> None:
    """Equal bit for bit, on words that belong to no value."""
    count, shift = 70, 12
    value = words(count * levels, -(2**31), 2**31 - 1).reshape(count, levels).int()
    found = words(count * (levels - 1) * 5, -(2**63), 2**63 - 1, 1).reshape(count, levels - 1, 5)
    last = words(2 * count, -(2**63), 2**63 - 1, 2).reshape(2, count)
    out = np.empty((count, levels), np.int64)
    _choose_cpu(value.numpy(), found.numpy(), last.numpy(), shift, at_client, out)

    x, expected = Truncation(value, shift), torch.zeros((count, levels), dtype=torch.int64)
    public = x.base[:, -1] if at_client else 0
    expected[:, -1] = public - last[0] + x.wrap[:, -1] * last[1]
    below, low, top, low_before, top_before = found.unbind(-1)
    expected[:, 1:] -= x.base[:, 1:] * below - low + x.wrap[:, 1:] * top
    expected[:, :-1] += x.base[:, :-1] * below - low_before + x.wrap[:, :-1] * top_before
    assert np.array_equal(out, expected.numpy())
