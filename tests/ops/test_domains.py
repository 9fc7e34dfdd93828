"""Scalar functions at the ends of what they take, and where they saturate."""

from __future__ import annotations

import math

import pytest
import torch

from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import WINDOW_FRAC
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from mergec.runtime.protocols.rows import MAX_SPREAD, SHIFTS

load_all()
UNIT = 2.0**-16
LEVELLED = 1 / 0.9
"""Below its domain a power keeps the value at 0.9 of the lower end."""


def evaluate(name: str, x: torch.Tensor, frac: int = 16, *more: str) -> torch.Tensor:
    simulation, op = Simulation(), REGISTRY[name]
    views = simulation.share(x, frac)
    return simulation.reveal(simulation.run(lambda ctx, p: op.protocol(ctx, views[p], *more)))


def around(*places: float) -> torch.Tensor:
    """Each place, and its neighbours in units of an input."""
    offsets = torch.arange(-2, 3, dtype=torch.float64) * UNIT
    return (torch.tensor(places, dtype=torch.float64)[:, None] + offsets).flatten()


@pytest.mark.parametrize("frac", [16, 32, WINDOW_FRAC])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("silu", 5e-5),
        ("gelu", 5e-5),
        ("quick_gelu", 5e-5),
        ("elu", 5e-5),
        ("mish", 5e-5),
        ("tanh", 5e-5),
        ("sigmoid", 5e-5),
        ("relu", 2 * UNIT),
        ("exp", 5e-5),
    ],
)
def test_up_to_both_ends(name: str, error: float, frac: int) -> None:
    """Far outside of its table a function is a constant or x, up to the last unit of its domain."""
    low, high = REGISTRY[name].domain
    x = around(low, low / 2, -16.0, -15.0, -8.0, -7.25, 0.0, 7.25, 8.0, 15.0, 16.0, high / 2, high)
    x = x[(x >= low + 2 * UNIT) & (x <= high - 2 * UNIT)]
    assert (evaluate(name, x, frac) - REGISTRY[name].reference(x)).abs().max() < error


@pytest.mark.parametrize(
    ("name", "relative"), [("reciprocal", 2.0**-16), ("rsqrt", 2.0**-16), ("log", 0.0)]
)
def test_positive_numbers_up_to_both_ends(name: str, relative: float) -> None:
    low, high = REGISTRY[name].domain
    powers = torch.arange(math.log2(low), math.log2(high) + 1)
    x = around(*torch.exp2(powers.double()).tolist())
    x = x[(x >= low) & (x < high)]
    wanted = REGISTRY[name].reference(x)
    allowed = relative * wanted.abs() + (3e-5 if name == "log" else 2 * UNIT)
    assert bool(((evaluate(name, x) - wanted).abs() < allowed).all())


@pytest.mark.parametrize("name", ["reciprocal", "rsqrt", "log"])
def test_zero_and_what_is_too_small_keep_the_value_of_the_end(name: str) -> None:
    low, _ = REGISTRY[name].domain
    x = torch.arange(0, low, UNIT, dtype=torch.float64)
    ends = REGISTRY[name].reference(torch.tensor([low, low / LEVELLED]).double())
    found = evaluate(name, x)
    slack = 2.0**-9 * ends.abs().max()
    assert bool(((found > ends.min() - slack) & (found < ends.max() + slack)).all())


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("offset", [0.0, -1e6, 16_384.0, 1e8])
def test_rows_of_scores_that_are_far_apart(offset: float, shift: str) -> None:
    """It matters how far apart they are, not where they lie, beyond a 32-bit window, too."""
    rows = torch.tensor(
        [[MAX_SPREAD, 0.0, MAX_SPREAD - 1, MAX_SPREAD / 2], [0.0, MAX_SPREAD, 1.0, 0.0]]
    ).double()
    # Rows of 48 entries are long enough for histograms.
    rows = rows.repeat_interleave(12, 1)
    found = evaluate("softmax", rows + offset, 16, shift)
    assert (found - torch.softmax(rows, -1)).abs().max() < 1e-4
