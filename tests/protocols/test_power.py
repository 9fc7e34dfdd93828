"""Reciprocals and inverse square roots over every octave in their valid range."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.power import (
    COLUMN_BITS,
    Power,
    power,
    power_cost,
    rounded_octaves,
    rounded_octaves_cost,
)
from tests.protocols.harness import integers, run

SPECS = [
    (Power(-1.0, 17, 16, 29), 30),
    (Power(-1.0, 16, 6, 33), 16),
    (Power(-1.0, 16, 0, 40), 16),
    (Power(-0.5, 37.17, 12, 53), 40),
    (Power(-0.5, 29.2, 0, 40), 16),
]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("spec", "frac"), SPECS)
def test_error_over_all_octaves(spec: Power, frac: int, exact: bool) -> None:
    edges = [2**j + d for j in range(spec.low, spec.high + 1) for d in (-1, 0, 1)]
    edges = [v for v in edges if v >= 2**spec.low] + [2 ** (spec.high + 1) - 1]
    spread = 2.0 ** torch.linspace(spec.low + 0.01, spec.high + 0.99, 3000, dtype=torch.float64)
    values = torch.cat([spread.to(torch.int64), torch.tensor(edges)])[:: 5 if exact else 1]
    simulation = Simulation(exact=exact)
    shares = integers(simulation, values)
    result, cost = run(simulation, lambda ctx, p: power(ctx, shares[p].share, spec, frac))
    wanted = (values.double() * 2.0**-spec.v_frac) ** spec.exponent * 2.0**frac
    error = (result.double() - wanted).abs()
    assert bool((error < 2**-17 * wanted + (2 if exact else 1.5)).all())
    if not exact:
        assert cost == power_cost(spec, frac, len(values))


@pytest.mark.parametrize("frac", [16, 30, 59])
@pytest.mark.parametrize("spec", [spec for spec, _ in SPECS])
def test_rounded_mantissas_are_those_of_the_octaves(spec: Power, frac: int) -> None:
    """Less than one unit off in the one column, and exactly zero in all others."""
    edges = [2**j + d for j in range(spec.low, spec.high + 1) for d in (-1, 0, 1)]
    values = torch.tensor(edges).clamp(2**spec.low, 2 ** (spec.high + 1) - 1).repeat(5)
    simulation = Simulation()
    shares = integers(simulation, values)
    found, cost = run(simulation, lambda ctx, p: rounded_octaves(ctx, shares[p].share, spec, frac))
    assert cost == rounded_octaves_cost(spec, len(values))
    assert bool(((found != 0).sum(1) == 1).all())
    exponents = spec.first_exponent - COLUMN_BITS * torch.arange(spec.octaves.columns)
    total = (found.double() * 2.0 ** exponents.double()).sum(1)
    wanted = (values.double() * 2.0**-spec.v_frac) ** spec.exponent * 2.0**frac
    unit = 2.0 ** exponents.double()[found.abs().argmax(1)]
    assert bool(((total - wanted).abs() < unit + 2**-17 * wanted).all())


@pytest.mark.parametrize("spec", [Power(-1.0, 16, 6, 33), Power(-0.5, 29.2, 0, 40)])
def test_beyond_the_octaves_nothing_is_larger_than_the_largest_result(spec: Power) -> None:
    """Zero, negative and too large numbers: the result is wrong, but overflows nothing later."""
    beyond = [0, -1, -(2**spec.low), -(2**50), 2 ** (spec.high + 2), 2**62 - 1, -(2**62)]
    values = torch.tensor(beyond).repeat(200)
    simulation = Simulation()
    shares = integers(simulation, values)
    result, _ = run(simulation, lambda ctx, p: power(ctx, shares[p].share, spec, 16))
    largest = (2.0**spec.low * 2.0**-spec.v_frac) ** spec.exponent * 2.0**16
    assert result.double().abs().max() < 1.25 * largest


def test_powers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="outside 0 to 53"):
        Power(-1.0, 16, 0, 60)


def test_columns_that_round_to_zero_are_left_out() -> None:
    spec = Power(-1.0, 16, 0, 53)
    shifts = spec.shifts(16)
    assert len(shifts) < spec.octaves.columns
    assert shifts[-1] <= 62 < shifts[-1] + 2
    # 2**16 is the largest result, and 60 bits of a mantissa are 44 more than 16.
    assert shifts == list(range(44 - 16, 63, 2))
