"""Exponentials in one round: every place of the table, masks, ends, roundings, what is seen."""

from __future__ import annotations

import decimal

import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.long import added
from mergec.runtime.protocols.broad import (
    _CORRECTED,
    _VALUES,
    Broad,
    broad_exponentials,
    broad_exponentials_cost,
    broad_sums,
    broad_sums_cost,
)
from mergec.runtime.protocols.opening import Cut
from mergec.runtime.protocols.rows import EXP_FRAC
from tests.protocols.harness import run, uniform_bytes, words

UNIT = 2**16
every_reach = pytest.mark.parametrize("reach", [6, 7, 8, 9])


def _evaluate(x: torch.Tensor, table: Broad) -> tuple[torch.Tensor, Simulation]:
    """The results for words of 32 bits, as integers."""
    simulation = Simulation()
    shares = [s.share.to(torch.int32) for s in simulation.share(x, 0)]
    found, cost = run(simulation, lambda ctx, p: broad_exponentials(ctx, Cut(shares[p]), table))
    assert cost == broad_exponentials_cost(len(x), table) and cost.rounds == 1
    assert simulation.to_client.total == 0
    return found, simulation


def _check(x: torch.Tensor, table: Broad) -> torch.Tensor:
    """Less than a unit off, but for the rounding of both factors; returns errors in units."""
    found, _ = _evaluate(x, table)
    exact = (x.double() / UNIT).exp() * 2.0**table.frac
    error = found.double() - exact
    assert bool((error.abs() <= 1 + exact * 2.0**-22).all())
    assert int(found.min()) >= 0
    return error


@every_reach
def test_the_whole_range_and_its_ends(reach: int) -> None:
    table = Broad(reach, 4, EXP_FRAC)
    end = 4 * UNIT - 1
    assert end - table.start == 2**reach * UNIT
    ends = [table.start, table.start + 1, end, end - 1, 0, 1, -1, -UNIT]
    x = torch.cat([torch.tensor(ends).repeat(50), words(20_000, table.start, end + 1)])
    _check(x, table)
    _check(torch.arange(-3 * UNIT, end + 1, 37), table)


@every_reach
def test_every_place_at_which_a_window_may_end(reach: int) -> None:
    """Masks are fresh in each run, so one input meets all windows and places in them."""
    table = Broad(reach, 4, EXP_FRAC)
    for x in (3.99, 0.0, -11.0, -25.0):
        _check(torch.full((4000,), round(x * UNIT)), table)


def _check_masks(x: torch.Tensor, masks: torch.Tensor, table: Broad) -> None:
    """Tables of these masks, each read for the number of its place, in the clear."""
    opened = (masks + x).to(torch.int32)
    share = words(len(masks) * table.dealt_bytes // 4, -(2**31), 2**31).to(torch.int32)
    share = share.reshape(len(masks), -1)
    own, total = share.clone(), torch.zeros(len(masks), dtype=torch.int64)
    _CORRECTED(own, masks.to(torch.int32), table)
    for part in (share, own):
        out = torch.empty_like(total)
        _VALUES(part, opened, table, out)
        total += out
    exact = (x.double() / UNIT).exp() * 2.0**table.frac
    assert bool(((total + 1 - exact).abs() <= 1 + exact * 2.0**-22).all())


SMALL = Broad(3, 1, 10)
PERIOD = 2 << SMALL.step_bits


def test_every_mask_of_a_small_table() -> None:
    """All residues of the mask modulo the table, against every kind of input."""
    masks = torch.arange(PERIOD)
    for x in (SMALL.start, SMALL.start + 1, -3 * UNIT, -1, UNIT - 2, UNIT - 1):
        _check_masks(torch.full_like(masks, x), masks, SMALL)


def test_every_number_of_a_small_table() -> None:
    """The whole range, both ends included, against masks at both ends of both windows."""
    x = torch.arange(SMALL.start, UNIT)
    half = PERIOD // 2
    for mask in (0, 1, half - 1, half, half + 1, PERIOD - 1, 12345):
        _check_masks(x, torch.full_like(x, mask), SMALL)


@every_reach
def test_roundings_have_the_right_expectation(reach: int) -> None:
    """Also of entries that are less than a unit: in a long row their sum counts."""
    table = Broad(reach, 4, EXP_FRAC)
    for x in (1.3, -10.1, -12.0, -13.5):
        errors = _check(torch.full((40_000,), round(x * UNIT)), table)
        assert abs(float(errors.mean())) < 5 * 0.5 / 200 + 2.0**-5 * (x > 1)


@every_reach
def test_far_below_a_unit_all_is_zero(reach: int) -> None:
    table = Broad(reach, 4, EXP_FRAC)
    found, _ = _evaluate(words(20_000, table.start, -36 * UNIT), table)
    assert int(found.abs().max()) <= 1
    assert int((found != 0).sum()) <= 1


@every_reach
@pytest.mark.parametrize("kept", [32, 96, 864])
def test_sums_of_rows_in_rings_of_any_size(reach: int, kept: int) -> None:
    """Of exponentials on both sides of 1; what exceeds a small ring is cut off."""
    table = Broad(reach, 1 << (reach - 1), 20, kept)
    end = (table.top << 16) - 1
    x = torch.cat([words(600, table.start, end + 1), torch.tensor([table.start, end, 0, -1])])
    rows = torch.arange(len(x)) % 7
    counts = torch.bincount(rows)
    simulation = Simulation()
    shares = [s.share.to(torch.int32) for s in simulation.share(x, 0)]
    client, server, dealer = simulation.run(
        lambda ctx, p: broad_sums(ctx, Cut(shares[p]), table, rows, counts)
    )
    assert simulation.cost == broad_sums_cost(len(x), table)
    assert dealer.is_meta and dealer.shape == client.shape == (7, kept // 32)
    with decimal.localcontext(prec=400):
        exact = [(decimal.Decimal(n) / UNIT).exp() * 2**20 for n in x.tolist()]
        for row, total in enumerate(added(client, server)):
            found = int.from_bytes(total.numpy().tobytes(), "little")
            wanted = sum(exact[row::7])
            allowed = int(counts[row]) + wanted / 2**22
            whole = round((wanted - found) / 2**kept)
            assert abs(found + whole * 2**kept - wanted) <= allowed
            assert whole == 0 or kept < 200


@pytest.mark.parametrize("value", [0, -8 * UNIT, 400 * UNIT])
def test_what_is_seen_is_uniform_and_of_one_shape(value: int) -> None:
    """Also for a number outside of the range."""
    table, count = Broad(7, 4, EXP_FRAC), 2000
    simulation = Simulation(record=True)
    shares = [s.share.to(torch.int32) for s in simulation.share(torch.full((count,), value), 0)]
    sent, kept = simulation.to_server, []
    write = sent.write
    sent.write = lambda data: (kept.append(data.clone()), write(data))[1]  # type: ignore[method-assign]
    simulation.run(lambda ctx, p: broad_exponentials(ctx, Cut(shares[p]), table))
    first, second = simulation.transcript
    assert first.dtype is torch.int32 and first.shape == (count,)
    for opened in (first, second, first + second, *kept):
        assert abs(uniform_bytes([opened])) < 6.5
    assert [len(data) for data in kept] == [count * table.dealt_bytes]


@pytest.mark.parametrize("count", [0, 7, 5000])
def test_shapes_alone_take_the_same_bytes(count: int) -> None:
    context, table = ShapeContext(), Broad(8, 4, EXP_FRAC)
    share = torch.empty(count, dtype=torch.int32, device="meta")
    rounds = list(broad_exponentials(context, Cut(share), table))
    cost = broad_exponentials_cost(count, table)
    assert len(rounds) == cost.rounds
    assert context.dealt == {"client": 0, "server": cost.offline}


@every_reach
def test_words_are_no_longer_than_they_must_be(reach: int) -> None:
    """Every number of fractional bits, among which are those that fill a word's last half."""
    filled = 0
    for frac in range(1, 49):
        for kept in (64, 96):
            table = Broad(reach, 4, frac, kept)
            room = 32 * table.halves - kept - table.drop
            assert 0 <= room < 32
            assert table.dealt_bytes == 2 * 4 * table.halves
            filled += room == 0
    assert filled


def test_a_table_without_room_raises() -> None:
    for reach, frac in ((2, 17), (6, 0), (6, 49), (6, 60)):
        with pytest.raises(ValueError, match="no exponential has"):
            Broad(reach, 4, frac)
