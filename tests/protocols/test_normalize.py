"""Row normalization, on small rows and on massive activations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergec.runtime.core.values import logical_shift
from mergec.runtime.correlations.prg import Prg, new_seed
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.columns import factors
from mergec.runtime.protocols.normalize import (
    SCALED_FRAC,
    RowNorm,
    _deal_cpu,
    _scale_cpu,
    normalize,
    normalize_cost,
    rounded_rows,
)
from mergec.runtime.protocols.truncate import OFFSET, Truncation, top_bit
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


def test_a_row_of_a_single_unit_is_normalized_without_an_eps() -> None:
    """The smallest sum of squares that is not zero lies in the lowest octave."""
    simulation = Simulation()
    shares = integers(simulation, torch.tensor([[1, 0, 0, 0], [0, -1, 0, 0], [1, 1, 0, 0]]))
    result, _ = run(
        simulation, lambda ctx, p: normalize(ctx, shares[p].share, RowNorm(4, 6, 0.0, 1.0))
    )
    exact = torch.tensor([[2.0, 0, 0, 0], [0, -2, 0, 0], [2**0.5, 2**0.5, 0, 0]])
    assert (result.double() * 2.0**-SCALED_FRAC - exact).abs().max() < 2**-12


@pytest.mark.parametrize("at_client", [False, True])
@pytest.mark.parametrize("shifts", [[-3, -1, 0, 1, 2], [1, 17, 62, 62], [-2, 0]])
def test_kernels_compute_what_words_of_tensors_do(shifts: list[int], at_client: bool) -> None:
    """Equal bit for bit, on words that belong to no row."""
    prg, rows, size = Prg(new_seed()), 3, 11
    down = [(k, s) for k, s in enumerate(shifts) if s > 0]

    def words(*shape: int) -> torch.Tensor:
        return torch.from_numpy(prg.read(8 * int(np.prod(shape))).view(np.int64).reshape(shape))

    mask, factors = words(rows, size), words(rows, len(shifts))
    low, crossed, top_crossed = words(rows, size, len(down)), words(rows, size), words(rows, size)
    dealt = (word.numpy() for word in (low, crossed, top_crossed))
    _deal_cpu(mask.numpy(), factors.numpy(), np.array(shifts), *dealt)
    shifted = [logical_shift(mask, s) if s > 0 else mask << -s for s in shifts]
    products = [part * factors[:, k, None] for k, part in enumerate(shifted)]
    for index, (k, _) in enumerate(down):
        assert torch.equal(low[..., index], shifted[k])
    assert torch.equal(crossed, torch.stack(products).sum(0))
    wrapped = sum((factors[:, k, None] << (64 - s) for k, s in down), torch.zeros_like(mask))
    assert torch.equal(top_crossed, top_bit(mask) * wrapped)

    opened, top, public, hidden = (words(rows, n) for n in (size, size, len(shifts), len(shifts)))
    share = (public if at_client else 0) - hidden
    expected, wrap = crossed.clone(), torch.zeros_like(opened)
    for index, (k, s) in enumerate(down):
        x = Truncation(opened, s)
        expected += x.base * share[:, k, None] - low[..., index] * public[:, k, None]
        wrap += x.wrap * public[:, k, None]
    for k, s in enumerate(shifts):
        if s <= 0:
            up = (mask << -s) * public[:, k, None]
            expected += ((opened - OFFSET) << -s) * share[:, k, None] - up
    expected += wrap * top - (opened >= 0).long() * top_crossed
    found = np.empty((rows, size), np.int64)
    given = (opened, mask, top, low, crossed, top_crossed, public, hidden)
    _scale_cpu(*(word.numpy() for word in given), np.array(shifts), at_client, found)
    assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("columns", "frac"),
    [
        ([7, 0, 1, 4, 56, 0], 48),
        ([3, 2, 1, 8, 2, 2, 58, 0], 44),
        ([64, 3], 40),
        ([63, 0, 1, 6], 16),
    ],
)
def test_columns_of_another_size(columns: list[int], frac: int, exact: bool) -> None:
    """Massive ones, up to 2**62 units and its negative, beside rows without any."""
    size = 64
    powers = factors(columns)
    rows = torch.randn(6, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows *= 300.0
    most = torch.full((size,), min(2.0 ** (62 - frac) - 1, 2.0**13)) * powers
    place = int(powers.argmax())
    rows[0, place], rows[1, place] = most[place], -most[place]
    bound = 4.0 ** math.ceil(math.log(float(rows.square().mean(-1).max()), 4))
    simulation = Simulation(exact=exact)
    shares = integers(simulation, torch.round(rows / powers * 2.0**frac).long())
    spec = RowNorm(size, frac, EPS, bound)
    result, cost = run(simulation, lambda ctx, p: normalize(ctx, shares[p].share, spec, columns))
    rounded = torch.round(rows / powers * 2.0**frac) * 2.0**-frac * powers
    wanted = rounded_rows(rounded, spec)
    error = (result.double() * 2.0**-SCALED_FRAC - wanted).abs()
    assert (error / wanted.abs().clamp(min=1.0)).max() < 3e-4
    if not exact:
        assert cost == normalize_cost(spec, 6, columns)


def test_columns_must_be_those_of_the_rows() -> None:
    with pytest.raises(ValueError, match="the parts have 63 columns, the rows 64"):
        normalize_cost(RowNorm(64, 32, EPS, 2.0**10), 1, [62, 0, 1, 4])
