"""Coefficients of every kind, and operands as large as the ring takes."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from mergec.runtime.ops.quadratic import Quadratic
from mergec.runtime.protocols.opening import open_masked

load_all()


@pytest.mark.parametrize(
    "coefficients",
    [(0.125, 0.25, 0.5), (0.25, 0.5, 0.0), (-2.0, 0.0, -7.25), (0.3, -1.7, 0.1), (0.0, 2.0, 1.0)],
)
def test_error(coefficients: tuple[float, float, float]) -> None:
    x = torch.cat([torch.linspace(-8, 8, 501), torch.tensor([60.0, -60.0, 0.0])]).double()
    simulation = Simulation()
    shares = simulation.share(x)
    views = simulation.run(lambda ctx, p: open_masked(ctx, shares[p]))
    results = simulation.run(lambda ctx, p: Quadratic.protocol(ctx, views[p], *coefficients))
    assert results[0].frac == Quadratic.scale(16, *coefficients, fixed=16)
    expected = Quadratic.reference(x, *coefficients)
    bound = 2.0**-15 * (1 + x.abs()) ** 2
    assert bool(((simulation.reveal(results) - expected).abs() < bound).all())
