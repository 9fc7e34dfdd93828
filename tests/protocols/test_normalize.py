"""Row normalization, on small rows and on massive activations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergec.runtime.core.messages import together
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import logical_shift
from mergec.runtime.correlations.prg import Prg, new_seed
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.columns import factors
from mergec.runtime.protocols.normalize import (
    SCALED_FRAC,
    RowNorm,
    _deal_cpu,
    _scale_cpu,
    _shifts,
    _whole,
    _whole_frac,
    _word_counts,
    fits_wide_rows,
    normalize,
    normalize_cost,
    open_factor,
    open_row,
    open_row_cost,
    rounded_rows,
    row_factor,
    row_factor_cost,
    row_factor_wide,
    row_factor_wide_cost,
    scale_rows,
    scale_rows_cost,
    scale_rows_wide,
    scale_rows_wide_cost,
)
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.power import Power
from mergec.runtime.protocols.rows import inverse
from mergec.runtime.protocols.truncate import OFFSET, Truncation, top_bit
from tests.protocols.harness import integers, run, wide_value

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


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("frac", [-3, 0, 5, 16, 27, 32, 40, 47])
@pytest.mark.parametrize(
    "spec", [inverse(129, "pairs"), Power(-0.5, 40.3, 10, 53), Power(-1.0, 20, 6, 24)]
)
def test_rows_are_scaled_by_the_power_of_their_number(spec: Power, frac: int, exact: bool) -> None:
    """Every octave and its neighbours, with rows at the size that this octave is for.

    The error is that of the docstring: two units of 2**-16, and 2**-14 relative, or 2**-13 with
    exact rounding; the row itself has units of 2**-frac.
    """
    edges = [2**k + d for k in range(spec.low, spec.high + 2) for d in (-1, 0, 1)]
    numbers = torch.tensor(edges).clamp(2**spec.low, 2 ** (spec.high + 1) - 1).repeat(3)
    wanted = torch.randn(len(numbers), 5, dtype=torch.float64) * 2
    factor = (numbers.double() * 2.0**-spec.v_frac) ** spec.exponent
    # A row may have any size that a word holds.
    rows = (wanted / factor[:, None] * 2.0**frac).clamp(-(2.0**61), 2.0**61).round().long()
    simulation = Simulation(exact=exact)
    shares, values = integers(simulation, rows), integers(simulation, numbers)

    def protocol(ctx, p):
        row, scale = yield from together(
            open_row(ctx, shares[p].share, frac, spec, 5), row_factor(ctx, values[p].share, spec)
        )
        result = yield from scale_rows(ctx, row, frac, scale, spec)
        return result

    result, cost = run(simulation, protocol)
    real = rows.double() * 2.0**-frac * factor[:, None]
    error = (result.double() * 2.0**-SCALED_FRAC - real).abs()
    relative = 2.0**-13 if exact else 2.0**-14
    assert bool((error <= 2.0**-15 + relative * real.abs()).all())
    if not exact:
        open_cost = open_row_cost(rows.numel()).beside(row_factor_cost(spec, len(rows)))
        assert cost == open_cost + scale_rows_cost(frac, spec, *rows.shape)


def test_a_mantissa_that_is_zero_is_exactly_zero_when_it_is_opened() -> None:
    """Else a row of another octave, which is shifted down too little, would be in the result."""
    for exact in (False, True):
        simulation = Simulation(exact=exact)
        shares = integers(simulation, torch.zeros(3000, 4, dtype=torch.int64))
        factors = simulation.run(lambda ctx, p, s=shares: open_factor(ctx, s[p].share))
        client, server = factors[:2]
        value = client.base - client.low - server.low + client.wrap * (client.top + server.top)
        assert not bool(value.any())


@pytest.mark.parametrize("at_client", [False, True])
@pytest.mark.parametrize("shifts", [[-3, -1, 0, 1, 2], [1, 17, 25, 62, 62], [-2, 0], [9, 9, 9]])
def test_kernels_compute_what_words_of_tensors_do(shifts: list[int], at_client: bool) -> None:
    """Equal bit for bit, on words that belong to no row."""
    prg, rows, size, columns = Prg(new_seed()), 3, 11, len(shifts)
    down = sorted({s for s in shifts if s > 0})
    far = [(k, s) for k, s in enumerate(shifts) if s > 20]

    def words(*shape: int) -> torch.Tensor:
        return torch.from_numpy(prg.read(8 * int(np.prod(shape))).view(np.int64).reshape(shape))

    mask, low_words, top_words = words(rows, size), words(rows, columns), words(rows, columns)
    low, topped = words(rows, size, len(down)), words(rows, size, columns)
    crossed = words(rows, size, 2)
    dealt = (word.numpy() for word in (low, topped, crossed))
    _deal_cpu(mask.numpy(), low_words.numpy(), top_words.numpy(), np.array(shifts), *dealt)
    shifted = [logical_shift(mask, s) if s > 0 else mask << -s for s in shifts]
    products = [part * low_words[:, k, None] for k, part in enumerate(shifted)]
    for index, s in enumerate(down):
        assert torch.equal(low[..., index], logical_shift(mask, s))
    for k, part in enumerate(shifted):
        assert torch.equal(topped[..., k], part * top_words[:, k, None])
    assert torch.equal(crossed[..., 0], torch.stack(products).sum(0))
    wrapped = sum(
        (low_words[:, k, None] << (64 - s) for k, s in enumerate(shifts) if s > 0),
        torch.zeros_like(mask),
    )
    assert torch.equal(crossed[..., 1], top_bit(mask) * wrapped)

    opened, top = words(rows, size), words(rows, size)
    base, wrap, both = words(rows, columns), words(rows, columns), words(rows, size, len(far))
    share = (base if at_client else 0) - low_words + wrap * top_words
    expected, wraps = crossed[..., 0].clone(), -crossed[..., 1]
    for k, s in enumerate(shifts):
        expected -= topped[..., k] * wrap[:, k, None]
        if s > 0:
            x = Truncation(opened, s)
            part = low[..., down.index(s)]
            expected += x.base * share[:, k, None] - part * base[:, k, None]
            wraps += (base[:, k, None] << (64 - s)) * top
        else:
            up = (mask << -s) * base[:, k, None]
            expected += ((opened - OFFSET) << -s) * share[:, k, None] - up
    for index, (k, s) in enumerate(far):
        wraps += (wrap[:, k, None] << (64 - s)) * both[..., index]
    expected += (opened >= 0).long() * wraps
    found = np.empty((rows, size), np.int64)
    given = (opened, mask, top, base, wrap, low_words, top_words, low, topped, crossed, both)
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


def test_scales_of_a_row_by_hand() -> None:
    """576 squares up to 2**18 leave (53 - 27.17) / 2 = 12.9 of 32 bits."""
    norm = RowNorm(576, 32, EPS, 2.0**18)
    assert (norm.square_shift, norm.eps_units, norm.largest) == (20, 96_637, 6)
    power = norm.inverse_root
    assert (power.low, power.high) == (16, 53)
    assert power.v_frac == pytest.approx(24 + math.log2(576))
    # An eps above all squares decides instead of them.
    assert RowNorm(576, 32, 2.0**20, 2.0**18).square_shift == 21
    assert RowNorm(4, 6, 0.0, 1.0).square_shift == 0
    assert RowNorm(4, 6, 0.0, 1.0).inverse_root.low == 0
    # One that fills all bits leaves two octaves, the fewest that there are.
    assert RowNorm(2, 32, 1.0, 1.0).eps_units == 2**53
    assert RowNorm(2, 32, 1.0, 1.0).inverse_root.low == 52
    # A fraction of a bit is in the factor.
    assert RowNorm(64, 32.5, EPS, 2.0**8).inverse_root.v_frac == 2 * (32.5 - 13) + 6 - 1


def test_without_a_bound_rows_are_expected_to_be_below_2_to_the_14() -> None:
    for size in (16, 32):
        unknown, known = (RowNorm(size, 40, EPS, bound).square_shift for bound in (0.0, 2.0**14))
        assert unknown == known
    assert RowNorm(16, 40, EPS, 2.0**13).square_shift < RowNorm(16, 40, EPS, 0.0).square_shift
    assert RowNorm(32, 40, EPS, 0.0).square_shift < RowNorm(32, 40, EPS, 2.0**15).square_shift


@pytest.mark.parametrize(
    ("shifts", "near", "far", "kind"),
    [
        ([18, 20], 2, 0, torch.int16), ([19, 21], 2, 1, torch.int16),
        ([36, 36], 1, 2, torch.int16), ([21, 37], 2, 2, torch.int32),
        ([-2, 0, 52], 1, 1, torch.int32), ([1, 53, 62], 3, 2, torch.int64),
    ],
)  # fmt: skip
def test_words_of_products_that_wrap_on_both_sides(
    shifts: list[int], near: int, far: int, kind: torch.dtype
) -> None:
    """From a shift of 21 on, in the shortest type that holds s - 20 bits."""
    found = _word_counts(np.array(shifts), True)
    assert found == ((near, len(shifts), 2), far, kind)
    assert _word_counts(np.array(shifts), False) == ((near, 0, 2), 0, torch.int64)


TWELVE = Power(-0.5, 40.0, 6, 53)
"""Its largest result is 2**17, and in the last of twelve columns it is 2**22 times as small."""


def test_shifts_of_columns_by_hand() -> None:
    """With 40 fractional bits the first column's rows lose 7 of 40 - 16 bits, 17 of which it adds;
    in bands of three columns the surplus of the others goes to their mantissas' weights."""
    shifts, weights = _shifts(40, TWELVE, 0)
    assert shifts.tolist() == list(range(7, 30, 2))
    assert weights.tolist() == [1] * 12
    shifts, weights = _shifts(40, TWELVE, 5)
    assert shifts.tolist() == [7] * 3 + [13] * 3 + [19] * 3 + [25] * 3
    assert weights.tolist() == [32, 8, 2] * 4
    assert _shifts(84, TWELVE, 0)[0].tolist() == [51, 53, 55, 57, 59, 61, *[62] * 6]
    shifts, weights = _whole(9, TWELVE)
    assert shifts.tolist() == [9] * 12
    assert weights.tolist() == [4**k for k in range(11, -1, -1)]
    assert _whole_frac(TWELVE) == 16 - 17 + 22


def test_rows_that_are_not_shifted_down_have_no_wide_form() -> None:
    assert [fits_wide_rows(frac, TWELVE) for frac in (33, 34, 62, 90)] == [False, True, True, True]


@pytest.mark.parametrize("finer", [0, 5])
@pytest.mark.parametrize("frac", [34, 47])
def test_rows_scaled_in_shares_modulo_2_to_the_128(frac: int, finer: int) -> None:
    """As in the ring of 64 bits, with the same fractional bits; the parties drop what they like."""
    numbers = torch.tensor([2**k + d for k in range(7, 53, 3) for d in (-1, 0, 1)])
    factor = (numbers.double() * 2.0**-TWELVE.v_frac) ** TWELVE.exponent
    wanted = torch.randn(
        len(numbers), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    rows = (wanted / factor[:, None] * 2.0**frac).clamp(-(2.0**61), 2.0**61).round().long()
    simulation = Simulation()
    shares, values = integers(simulation, rows), integers(simulation, numbers)

    def protocol(ctx, p):
        scale = yield from row_factor_wide(ctx, values[p].share, TWELVE)
        mask = ctx.mask(rows.shape)
        opened = yield from open_under(ctx, shares[p].share, mask, OFFSET)
        return scale_rows_wide(ctx, opened, mask, frac, scale, TWELVE, finer)

    simulation.cost = Cost()
    client, server, dealer = simulation.run(protocol)
    assert dealer.low.is_meta and client.frac == SCALED_FRAC + finer
    found = wide_value(client, server) * 2.0**-client.frac
    real = rows.double() * 2.0**-frac * factor[:, None]
    assert bool(((found - real).abs() <= 2.0**-15 + 2.0**-14 * real.abs()).all())
    opened = Cost(1, 16 * rows.numel())
    scaled = scale_rows_wide_cost(frac, TWELVE, *rows.shape, finer)
    assert simulation.cost == row_factor_wide_cost(TWELVE, len(rows)) + opened + scaled


def test_columns_must_be_those_of_the_rows() -> None:
    with pytest.raises(ValueError, match="the parts have 63 columns, the rows 64"):
        normalize_cost(RowNorm(64, 32, EPS, 2.0**10), 1, [62, 0, 1, 4])
