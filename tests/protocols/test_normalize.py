"""Row normalization, small rows and massive activations alike."""

from __future__ import annotations

import pytest
import torch

from runtime.protocols.normalize import SCALED_FRAC, RowNorm, normalize, normalize_cost
from runtime.simulate import Simulation
from tests.protocols.harness import integers, run

EPS = 1e-5


@pytest.mark.parametrize(
    ("size", "frac", "bound", "spread", "peak", "tolerance"),
    [
        (64, 16, 2.0**10, 1.0, None, 2e-4),
        (576, 32, 2.0**10, 1.0, None, 8e-5),
        (576, 32, 2.0**24, 30.0, 24_926.0, 2e-4),
        (48, 32 + 5.585, 2.0**8, 2.0, None, 8e-5),
    ],
)
def test_against_float64(
    size: int, frac: float, bound: float, spread: float, peak: float | None, tolerance: float
) -> None:
    rows = torch.randn(6, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows *= spread
    if peak is not None:
        rows[0, 3] = peak
    simulation = Simulation()
    shares = integers(simulation, torch.round(rows * 2.0**frac).long())
    spec = RowNorm(size, frac, EPS, bound)
    result, cost = run(simulation, lambda ctx, p: normalize(ctx, shares[p].share, spec))
    exact = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS)
    assert (result.double() * 2.0**-SCALED_FRAC - exact).abs().max() < tolerance
    assert cost == normalize_cost(spec, 6)


def test_a_row_of_zeros_stays_zero() -> None:
    simulation = Simulation()
    shares = integers(simulation, torch.zeros(1, 64, dtype=torch.int64))
    spec = RowNorm(64, 32, EPS, 2.0**10)
    result, _ = run(simulation, lambda ctx, p: normalize(ctx, shares[p].share, spec))
    assert (result.double() * 2.0**-SCALED_FRAC).abs().max() < 0.01
