"""Products whose rows are normalized behind them, against float64 and against words."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.spec import HEADROOM_BITS, SERVER
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.deferred import (
    Deferred,
    deferred_norm,
    deferred_norm_cost,
    deferred_norm_wide,
    fits_wide_product,
)
from mergec.runtime.protocols.normalize import SCALED_FRAC, RowNorm
from mergec.runtime.protocols.weights import Weight, share_weight
from tests.protocols.harness import integers, wide_value

EPS = 1e-5
every_way = pytest.mark.parametrize("way", [{}, {"exact": True}, {"wide": True}], ids=str)
every_ring = pytest.mark.parametrize("wide", [False, True])
WEIGHT_FRAC = 16


def run(
    rows: torch.Tensor,
    matrix: torch.Tensor,
    spec: Deferred,
    *,
    exact: bool = False,
    wide: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Simulation]:
    """The result as real numbers, what it should be, and the simulation with the cost of the run.

    The reference multiplies the rows and the matrix as they are rounded to fixed point. wide: in
    shares modulo 2**128, where this spec admits them.
    """
    if wide and not fits_wide_product(spec, len(matrix)):
        pytest.skip("rows that are shifted up have no wide form")
    simulation = Simulation(exact=exact)
    frac = int(spec.norm.frac)
    rounded = torch.round(rows * 2.0**frac)
    shares = integers(simulation, rounded.long())
    further = [bits for size, bits in spec.further(len(matrix)) for _ in range(size)]
    units = torch.exp2(WEIGHT_FRAC + torch.tensor(further).double())
    words = torch.round(matrix * units[:, None]).long()
    weights = simulation.run(
        lambda ctx, p: share_weight(ctx, "w", words if p == SERVER else words.to("meta"), 16)
    )
    simulation.cost = type(simulation.cost)()
    protocol = deferred_norm_wide if wide else deferred_norm
    client, server, dealer = simulation.run(
        lambda ctx, p: protocol(ctx, shares[p].share, weights[p], spec)
    )
    assert (dealer.low if wide else dealer).is_meta
    assert dealer.shape == client.shape == (*rows.shape[:-1], len(matrix))
    if wide:
        assert client.frac == SCALED_FRAC + spec.finer
    total = wide_value(client, server) if wide else (client + server).double()
    found = total / units * 2.0 ** (WEIGHT_FRAC - SCALED_FRAC - spec.finer)
    rows = rounded * 2.0**-frac
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + spec.norm.eps)
    return found, (rows @ (words / units[:, None]).T) * scale, simulation


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def tolerance(
    spec: Deferred, rows: torch.Tensor, matrix: torch.Tensor, exact: bool = False
) -> torch.Tensor:
    """What the docstring promises of each result: the row's lost bits, the mantissa, two units.

    With exact rounding two columns may share a number, and both of their mantissas are rounded.
    And the sum of squares of rows that are far smaller than the largest that is expected: each
    entry is rounded by less than a unit at random, so six standard deviations of all together.
    """
    product = rows @ matrix.T
    mean = rows.square().mean(-1, keepdim=True) + spec.norm.eps
    units = mean.sqrt() * 2.0 ** (spec.norm.frac - spec.norm.square_shift)
    relative = 2.0 ** (-13 if exact else -14) + 6 * 0.5 / (units * rows.shape[-1] ** 0.5)
    lost = 2.0 ** (spec.drop - int(spec.norm.frac)) if spec.drop else 0.0
    moved = lost * matrix.abs().sum(-1).max() * mean.rsqrt()
    assert float(product.abs().max()) * 2.0**spec.frac < 2.0**HEADROOM_BITS
    return moved + relative * (product * mean.rsqrt()).abs() + 2 * 2.0**-16


@every_way
@pytest.mark.parametrize("finer", [0, 1, 5, 16, 22])
@pytest.mark.parametrize("frac", [16, 24, 32, 38, 54])
def test_against_float64(frac: int, finer: int, way: dict[str, bool]) -> None:
    rows, matrix = normal(4, 64), normal(9, 64, seed=3)
    rows[1] *= 2.0**-5
    spec = Deferred(RowNorm(64, frac, EPS, 2.0**8), max(0, frac - 30), WEIGHT_FRAC, finer)
    found, wanted, simulation = run(rows, matrix, spec, **way)
    assert bool(((found - wanted).abs() <= tolerance(spec, rows, matrix, "exact" in way)).all())
    if not way.get("exact"):
        cost = deferred_norm_cost(spec, 4, ghost_weight(9, 64), wide=bool(way))
        assert simulation.cost == cost


def ghost_weight(outputs: int, inputs: int) -> Weight:
    words = torch.empty((outputs, inputs), dtype=torch.int64, device="meta")
    return Weight(words, words, words, WEIGHT_FRAC)


@every_way
def test_massive_activations_beside_ordinary_and_tiny_rows(way: dict[str, bool]) -> None:
    """All in one product: no range is lost, as each octave has a shift of its own."""
    rows, matrix = normal(5, 576), normal(40, 576, seed=3) * 0.2
    rows[0] *= 30
    rows[0, 3] = 24_926.0
    rows[1, 7] = -20_000.0
    rows[3] *= 2.0**-4
    rows[4] = 0.0
    norm = RowNorm(576, 24, EPS, 2.0**22)
    spec = Deferred(norm, 0, WEIGHT_FRAC, 5)
    found, wanted, _ = run(rows, matrix, spec, **way)
    assert bool(((found - wanted).abs() <= tolerance(spec, rows, matrix, "exact" in way)).all())
    assert found[4].abs().max() < 2**-15


@every_way
def test_rows_of_zeros_and_of_single_units(way: dict[str, bool]) -> None:
    rows, matrix = torch.zeros(3, 16, dtype=torch.float64), normal(5, 16)
    rows[1, 4], rows[2] = 2.0**-20, -(2.0**-20)
    spec = Deferred(RowNorm(16, 20, EPS, 1.0), 0, WEIGHT_FRAC, 8)
    found, wanted, _ = run(rows, matrix, spec, **way)
    assert bool(((found - wanted).abs() <= tolerance(spec, rows, matrix, "exact" in way)).all())


@every_way
def test_parts_with_bits_of_their_own(way: dict[str, bool]) -> None:
    rows, matrix = normal(3, 32), normal(9, 32, seed=3)
    parts = (2, 0, 4, 6, 3, 3)
    spec = Deferred(RowNorm(32, 24, EPS, 2.0**6), 2, WEIGHT_FRAC, 7, parts)
    found, wanted, _ = run(rows, matrix, spec, **way)
    assert bool(((found - wanted).abs() <= tolerance(spec, rows, matrix, "exact" in way)).all())


@every_ring
def test_products_as_large_as_the_ring_allows(wide: bool) -> None:
    """Before scaling up to 2**62 units, of either sign, and rows of any number of dimensions."""
    rows = torch.full((1, 2, 16), 2.0**10, dtype=torch.float64)
    rows[0, 1] *= -1
    matrix = torch.full((2, 16), 1.999, dtype=torch.float64)
    spec = Deferred(RowNorm(16, 30, EPS, 2.0**20), 0, WEIGHT_FRAC, 16)
    found, wanted, _ = run(rows, matrix, spec, wide=wide)
    assert float((rows @ matrix.T).abs().max()) * 2.0**spec.frac > 2.0 ** (HEADROOM_BITS - 2)
    assert bool(((found - wanted).abs() <= tolerance(spec, rows, matrix)).all())


@every_ring
@pytest.mark.parametrize("bits", [3, 4])
def test_every_row_of_a_small_domain(bits: int, wide: bool) -> None:
    """Every pair of entries, as one row each; the matrix is the identity."""
    side = torch.arange(-(2**bits), 2**bits, dtype=torch.float64)
    rows = torch.cartesian_prod(side, side) * 2.0**-4
    # In shares modulo 2**128 no row may be shifted up, so all are lifted first.
    lift = 14 if wide else 0
    spec = Deferred(RowNorm(2, 4 + lift, 0.0, 2.0**4), 0, WEIGHT_FRAC, 3)
    found, wanted, _ = run(rows, torch.eye(2, dtype=torch.float64), spec, wide=wide)
    present = (rows != 0).any(-1)
    assert (found - wanted)[present].abs().max() < 2**-13
    assert not bool(found[~present].any())


def test_the_server_s_product_depends_on_fresh_masks_alone() -> None:
    """The row that goes to the server is another uniform word each time, whatever the row is."""
    rows, matrix = torch.zeros(64, 16, dtype=torch.float64), normal(3, 16)
    spec = Deferred(RowNorm(16, 24, EPS, 1.0), 4, WEIGHT_FRAC, 8)
    seen = []
    for _ in range(2):
        simulation = Simulation(record=True)
        shares = integers(simulation, rows.long())
        words = torch.round(matrix * 2.0**16).long()
        weights = simulation.run(
            lambda ctx, p, w=words: share_weight(ctx, "w", w if p == SERVER else w.to("meta"), 16)
        )
        simulation.transcript.clear()
        simulation.run(
            lambda ctx, p, s=shares, w=weights: deferred_norm(ctx, s[p].share, w[p], spec)
        )
        seen.append([payload for payload in simulation.transcript if payload.shape == rows.shape])
    # The opening of the rows, in both directions, and the message to the server.
    assert len(seen[0]) == len(seen[1]) == 3
    for first, second in zip(*seen, strict=True):
        assert not bool((first == second).any())
        assert len(first.unique()) == first.numel()


def test_parts_and_bits_that_a_product_cannot_have() -> None:
    norm = RowNorm(8, 32, EPS, 2.0**4)
    assert Deferred(norm, 2, WEIGHT_FRAC, 0).further(5) == [(5, 0)]
    assert Deferred(norm, 2, WEIGHT_FRAC, 0, (2, 3, 3, 0)).further(5) == [(2, 3), (3, 0)]
    with pytest.raises(ValueError, match=f"has no {SCALED_FRAC - 1} fractional bits"):
        Deferred(norm, 2, WEIGHT_FRAC, -1)
    for parts in ((4, 0), (4, 1, 2, 0), (4, 1, 1, -1)):
        with pytest.raises(ValueError, match="are not those of 5 columns"):
            Deferred(norm, 2, WEIGHT_FRAC, 0, parts).further(5)
