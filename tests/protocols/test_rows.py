"""Exponentials of rows, by each way to find the shift: error, smallest entries, room, sums."""

from __future__ import annotations

import math

import pytest
import torch

from mergec.runtime.core.values import decode
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops.attention import Attention
from mergec.runtime.protocols.histogram import FEW
from mergec.runtime.protocols.opening import open_masked
from mergec.runtime.protocols.probabilities import WAYS
from mergec.runtime.protocols.rows import (
    BROAD,
    EXP_FRAC,
    HIDDEN_GAP,
    MAX_ROW,
    MAX_SPREAD,
    SHIFTS,
    SLOTS,
    exponentials,
    exponentials_cost,
    hiding,
    inverse,
    logarithm_called,
    reach_of_rows,
    shift_called,
    shift_supplies,
    shift_variants,
)
from tests.protocols.harness import run

ERROR = 4e-5
"""Of the row's largest entry; what `exponentials` promises."""

LONG = FEW + 8
every_shift = pytest.mark.parametrize("shift", SHIFTS)


def _exponentials(x: torch.Tensor, shift: str, frac: int = 16) -> torch.Tensor:
    simulation = Simulation()
    views = simulation.share(x, frac)
    valid = torch.ones(x.shape, dtype=torch.bool)
    found, cost = run(simulation, lambda ctx, p: exponentials(ctx, views[p], valid, shift))
    assert cost == exponentials_cost(valid, shift)
    return decode(found, EXP_FRAC)


def _errors(x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Of each entry as a part of the row's largest, given the shift that fits the largest best.

    The shift is unknown, but the ratio of an entry and the largest is not: both are off by `ERROR`.
    """
    most, place = x.max(1, keepdim=True)
    return (found / found.gather(1, place) - (x - most).exp()).abs()


@every_shift
@pytest.mark.parametrize("frac", [16, 32, 48])
def test_every_fraction_of_the_maximum(shift: str, frac: int) -> None:
    """Steps of 1/64 over 8 units, at places of the circle where a cell or a cut may end."""
    steps = torch.arange(512).double() / 64
    offsets = torch.tensor([0.0, 125.0, 253.0, -32_740.0]).double()
    top = (offsets[:, None] + steps).reshape(-1, 1)
    below = torch.linspace(0, 16, LONG - 1).double()
    x = torch.cat([top, top - below], 1)
    found = _exponentials(x, shift, frac)
    assert _errors(x, found).max() < 2 * ERROR
    assert bool((found.max(1).values >= 1 - ERROR).all())
    assert bool((found.max(1).values < 2.0 ** SHIFTS[shift].top_bits).all())
    assert bool((found.max(1).values < math.exp(SHIFTS[shift].reach) * (1 + ERROR)).all())
    assert bool((found > -ERROR).all())


@every_shift
def test_random_rows_of_any_spread(shift: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(400, LONG, dtype=torch.float64, generator=generator)
    x *= torch.logspace(-2, 3.9, 400, dtype=torch.float64)[:, None]
    x = x.clamp(-MAX_SPREAD / 2, MAX_SPREAD / 2) + 1e5
    assert _errors(x, _exponentials(x, shift)).max() < 2 * ERROR


@every_shift
def test_small_entries_are_cut_where_they_hardly_count(shift: str) -> None:
    """Eleven units below the maximum an entry is still there, far below it is zero.

    In between, where a table reaches that far, it is less than a unit, rounded up or down.
    """
    places = [11.0, 17.8, 20.0, 255.0, 256.0, 1000.0, MAX_SPREAD - 1]
    x = torch.zeros(300, LONG, dtype=torch.float64) + torch.arange(300)[:, None] / 7
    for column, place in enumerate(places):
        x[:, column] -= place
    found = _exponentials(x, shift)
    assert bool((found[:, 0] > 2.0**-EXP_FRAC).all())
    chosen = SHIFTS[shift]
    assert bool((found[:, 1 : len(places)] <= 2.0**-EXP_FRAC).all())
    for column, place in enumerate(places):
        if place >= chosen.lowest + chosen.reach:
            assert bool((found[:, column] == 0).all())
    assert chosen.lowest + chosen.reach < 31


@every_shift
@pytest.mark.parametrize("length", [1, FEW, FEW + 1, 256, MAX_ROW])
def test_sums_stay_within_what_the_inverse_takes(shift: str, length: int) -> None:
    """The longest row of the largest exponentials, and a row of one that is just 1."""
    spec = inverse(length, shift)
    largest = length * math.exp(SHIFTS[shift].reach) * 2**EXP_FRAC
    assert 2**spec.low <= 2**EXP_FRAC * (1 - ERROR)
    assert largest * (1 + ERROR) < 2 ** (spec.high + 1)


def test_ways_that_a_compile_compares_and_a_store_deals() -> None:
    assert [each["shift"] for each in shift_variants()] == ["pairs", "histogram"]
    assert [each["shift"] for each in shift_variants(7)] == [
        "pairs", "histogram", "broad-7", "broad-7-digits", "broad-7-keys"
    ]  # fmt: skip
    for names in (["pairs", "pairs-to-server"], ["histogram", "histogram-to-server"]):
        for name in names:
            assert [each["shift"] for each in shift_supplies(name)] == names
    assert not list(shift_supplies("broad-7"))


@pytest.mark.parametrize("name", ["log-6", "log-9"])
def test_long_rows_and_those_with_hidden_keys_are_shifted(name: str) -> None:
    broad = "broad-" + name[-1]
    assert logarithm_called(name, 4096, False) == (name, WAYS[name])
    assert logarithm_called(name, 4097, False) == (broad, None)
    assert logarithm_called(name, 1, True) == (broad, None)
    assert logarithm_called("pairs", 1, False) == ("pairs", None)


def test_a_reach_with_hidden_scores_has_their_gap_besides() -> None:
    """Before they are hidden, rows may spread by half of what is left: 10, 42, 106, 234."""
    spreads = (0, 10, 10.1, 42, 106, 234, 234.1)
    assert [reach_of_rows(x / 8, True) for x in spreads] == [6, 6, 7, 7, 8, 9, 0]


def test_a_shift_without_a_name_raises() -> None:
    for use in (lambda name: inverse(4, name), lambda name: _exponentials(torch.ones(1, 4), name)):
        with pytest.raises(KeyError, match="mean"):
            use("mean")


@every_shift
def test_attention_to_large_values_has_the_room_that_is_stated(shift: str) -> None:
    """Values just below the bound, in a row of equal scores, where the sum is largest."""
    length, bits = 64, 29 - SHIFTS[shift].top_bits
    size = 2.0 ** (bits - 6) * 0.99
    q, k = torch.zeros(1, 1, 8, 2).double(), torch.zeros(1, 1, length, 2).double()
    v = torch.full((1, 1, length, 2), size).double()
    simulation = Simulation()
    views = [simulation.share(x, 16) for x in (q, k, v)]
    masked = [simulation.run(lambda ctx, p, x=x: open_masked(ctx, x[p])) for x in views]
    results = simulation.run(
        lambda ctx, p: Attention.protocol(ctx, *(m[p] for m in masked), None, 1.0, 0.0, shift)
    )
    # The result has 32 fractional bits, with at most 2**-14 of it in error.
    assert (simulation.reveal(results) - v[:, :, :8]).abs().max() < 2**-13 * size


@pytest.mark.parametrize("reach", [0, 6, 9])
def test_hidden_scores_stay_in_range_and_below_the_gap(reach: int) -> None:
    """Of rows as far apart as they may be, wherever the largest of the other scores is."""
    below, apart = hiding(reach)
    within = 2.0**reach - 4 if reach else MAX_SPREAD
    assert apart > 0
    assert below + apart == within
    assert below - apart == HIDDEN_GAP


@pytest.mark.parametrize("frac", [16, 17, 32])
def test_exact_rounding_always_compares_pairs(frac: int) -> None:
    """There is no finer table for the wider range; and the compiler sees that pairs cost less."""
    x = torch.randn(6, LONG, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid, costs = torch.ones(x.shape, dtype=torch.bool), []
    for shift in SHIFTS:
        simulation = Simulation(exact=True)
        views = simulation.share(x, frac)
        found, cost = run(
            simulation, lambda ctx, p, v=views, s=shift: exponentials(ctx, v[p], valid, s)
        )
        assert _errors(x, decode(found, EXP_FRAC)).max() < 2 * ERROR
        costs.append(cost)
    assert all(cost == costs[0] for cost in costs)


@pytest.mark.parametrize("shift", [*SLOTS, *BROAD])
@pytest.mark.parametrize("frac", [16, 32, 48])
def test_exponentials_of_rows_within_the_reach(shift: str, frac: int) -> None:
    kind, number, *way = shift.split("-")
    bits, rounds = int(number), {"slots": 4, "broad": 3}[kind] + bool(way)
    keys, apart = "keys" in way, 2.0**bits - shift_called(shift).reach
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(300, 50, dtype=torch.float64, generator=generator)
    x *= torch.logspace(-2, bits * 0.30, 300, dtype=torch.float64)[:, None]
    x[:, 1], x[:, 2] = x[:, 0] - apart, x[:, 0]
    # The maximum at, and a unit beside, each place where the shift may be another one.
    x[:200] += (torch.arange(200) // 3 / 8 + (torch.arange(200) % 3 - 1) * 2.0**-16)[:, None]
    x = x.clamp(min=x.max(1, keepdim=True).values - apart) + 1e4
    simulation = Simulation()
    views = simulation.share(x, frac)
    valid = torch.ones(x.shape, dtype=torch.bool)
    found, cost = run(simulation, lambda ctx, p: exponentials(ctx, views[p], valid, shift))
    assert cost == exponentials_cost(valid, shift) and cost.rounds == rounds
    assert (simulation.to_client.total > 0) == keys
    found = decode(found, EXP_FRAC)
    most, place = x.max(1, keepdim=True)
    largest = found.gather(1, place)
    assert (found / largest - (x - most).exp()).abs().max() < 8e-5
    assert (
        float(largest.min()) >= 1 - 4e-5
        and float(largest.max()) < 2.0 ** shift_called(shift).top_bits
    )
    spec = inverse(50, shift)
    sums = found.sum(1) * 2**EXP_FRAC
    assert float(sums.min()) >= 2**spec.low and float(sums.max()) < 2 ** (spec.high + 1)
