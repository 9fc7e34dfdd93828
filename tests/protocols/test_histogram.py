"""The maximum of rows by histograms: every place on the circle, wide and long rows, masked ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.correlations import counters
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols import histogram
from mergec.runtime.protocols.histogram import FEW, STEP, crest, crest_cost
from mergec.runtime.protocols.rows import MAX_SPREAD
from tests.families import slow
from tests.protocols.harness import run, uniform_bytes, words

UNIT = 2**16
SPREAD = int(MAX_SPREAD) * UNIT
WRAP = 2**32


@pytest.fixture(autouse=True)
def histograms_of_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any length take a histogram here, but where a test says otherwise."""
    monkeypatch.setattr(histogram, "FEW", 0)


def _crest(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    simulation = Simulation()
    # The parties' shares are modulo 2**32, as those of a window are.
    shares = [s.share.to(torch.int32) for s in simulation.share(values, 0)]
    result, cost = run(simulation, lambda ctx, p: crest(ctx, shares[p], valid))
    assert cost == crest_cost(valid)
    assert cost.rounds == (4 if int(valid.sum(1).max()) > histogram.FEW else 3)
    return result.long()


def _check(values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
    """Below the maximum by less than four units, modulo 2**32."""
    valid = torch.ones(values.shape, dtype=torch.bool) if valid is None else valid
    exact = torch.where(valid, values, -(2**62)).max(1).values
    found = _crest(values, valid)
    assert bool((found % UNIT == 0).all())
    assert bool(((exact - found) % WRAP < (STEP + 1) * UNIT).all())


@pytest.mark.parametrize("step", [7, *slow(1)])
def test_every_integer_modulo_2_16_alone_in_its_row(step: int) -> None:
    """With the step 7 every low byte and every high byte, each beside many of the other's."""
    _check((torch.arange(0, 2**16, step)[:, None]) * UNIT + 40_000)


def test_every_order_of_four_values_with_ties_at_every_part_of_a_cell() -> None:
    rows = torch.tensor(list(itertools.product((-3, 0, 0.5, 130), repeat=4)))
    for place in (0, 1, 127, 128, 255, 2**15 - 1, -1):
        _check(((rows + place) * UNIT).long())


@pytest.mark.parametrize("gap", [1, 127, 128, 129, 255, 256, 257, 16_000, 32_000])
def test_two_values_at_places_all_around_the_circle(gap: int) -> None:
    low = torch.arange(0, 2**16, 37)
    _check(torch.stack([low + gap, low, low], 1) * UNIT)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 129, 255, 256, 257, 4096])
def test_rows_of_any_length(length: int) -> None:
    count = 20 if length < 1000 else 8
    values = words(count * length, 0, SPREAD, seed=length).reshape(count, length)
    values[0] = values[0, 0]
    values[1] = torch.arange(length) * 1000
    values[2] = -values[1]
    # One spike above equal values, and one equal value in a row of low ones.
    values[3], values[4] = 5 * UNIT, -7
    values[3, length // 2] = 5 * UNIT + SPREAD
    values[4, -1] = -7 - SPREAD
    values[5] = -1
    # All in the top cell but one.
    values[6] = words(length, 0, 200 * UNIT, seed=length)
    values[6, 0] = -SPREAD + 200 * UNIT
    _check(values)


def test_256_equal_scores_are_not_none() -> None:
    for length in (256, 512, 4096):
        values = torch.full((2, length), 12 * UNIT)
        values[1, : length // 2] = -SPREAD
        _check(values)


def test_spreads_up_to_the_edge_of_the_range_from_every_fraction() -> None:
    low = words(400, -(2**31), 2**31)
    high = low + SPREAD
    between = low + (words(400, 0, 2**31, seed=1) % SPREAD)
    _check(torch.stack([low, high, between], 1))
    _check(torch.stack([high, high, low], 1))


def test_masked_entries_are_left_out() -> None:
    values = words(40 * 37, -(2**31), 2**31).reshape(40, 37)
    valid = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    valid[:, 5] = True
    valid[3] = False
    valid[3, 36] = True
    values[valid] = words(int(valid.sum()), 0, SPREAD)
    _check(values, valid)
    values = words(40 * 37, 0, SPREAD).reshape(40, 37)
    _check(values, torch.ones(40, 37, dtype=torch.bool).tril())


def test_short_rows_are_compared_beside_the_histograms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their order is, and also if there are no long ones."""
    monkeypatch.setattr(histogram, "FEW", FEW)
    values = words(60 * 60, 0, SPREAD).reshape(60, 60)
    causal = torch.ones(60, 60, dtype=torch.bool).tril()
    for valid in (causal, causal.flip(0), causal[torch.arange(60) * 7 % 60], causal[:FEW]):
        _check(values[: len(valid)], valid)
    cost = crest_cost(causal[:FEW])
    assert cost.rounds == 3 and cost.offline < crest_cost(causal[: FEW + 1]).offline


def test_processors_without_aes_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "LANES", 0)
    for length in (5, 300):
        _check(words(6 * length, 0, SPREAD).reshape(6, length))


@pytest.mark.parametrize("fill", ["equal", "fractions", "two", "far", "beyond the range"])
def test_what_is_opened_is_uniform_and_of_one_shape(fill: str) -> None:
    """Also where the row is wider than what the result is right for."""
    values = torch.zeros(4096, 3, dtype=torch.int64)
    if fill == "fractions":
        values -= 1
    elif fill == "two":
        values[:, 1] = 100 * UNIT
    elif fill == "far":
        values[:, 1] = SPREAD
    elif fill != "equal":
        values[:, 1], values[:, 2] = 22_000 * UNIT, 44_000 * UNIT
    sent = _sent(values)
    assert [(t.dtype, tuple(t.shape)) for t in sent[::2]] == [
        (torch.int16, (4096 * 3,)),
        (torch.int8, (4096, 127)),
        (torch.int8, (4096,)),
        (torch.int8, (4096, 127)),
    ]
    for first, second in zip(sent[::2], sent[1::2], strict=True):
        assert first.dtype == second.dtype and first.shape == second.shape
        for seen in (first, second, first + second):
            assert abs(uniform_bytes([seen])) < 6.5


def _sent(values: torch.Tensor) -> list[torch.Tensor]:
    simulation = Simulation(record=True)
    shares = [s.share.to(torch.int32) for s in simulation.share(values, 0)]
    valid = torch.ones(values.shape, dtype=torch.bool)
    simulation.run(lambda ctx, p: crest(ctx, shares[p], valid))
    return simulation.transcript


@pytest.mark.parametrize("rows", [2**13, *slow(2**15)])
@pytest.mark.parametrize("other", [0, -100])
def test_the_cell_is_independent_of_the_opened_scores(other: int, rows: int) -> None:
    """A carry puts a maximum into one of two cells; seen with z, the cell must not tell which."""
    values = torch.zeros(rows, 3, dtype=torch.int64)
    values[:, 1], values[:, 2] = 300 * UNIT, (300 + other) * UNIT
    sent = _sent(values)
    z = (sent[0] + sent[1]).reshape(-1, 3).long()
    cell = (sent[4] + sent[5]).long() & 255
    # The top of the low bits of two z, from which carries follow, beside the cell's low bits.
    low = ((z[:, 1:] & 127) >> 5) @ torch.tensor([1, 4])
    joint = torch.bincount(low * 16 + cell % 16, minlength=256).double()
    each = rows / 256
    statistic = float(((joint - each) ** 2 / each).sum())
    assert abs(statistic - 255) / (2 * 255) ** 0.5 < 6.5


def test_shapes_alone_take_the_same_rounds() -> None:
    valid = torch.ones(3, 9, dtype=torch.bool)
    context = ShapeContext()
    steps = crest(context, torch.empty(3, 9, dtype=torch.int32, device="meta"), valid)
    sent = []
    message = next(steps)
    try:
        while True:
            sent.append((message.payload.dtype, message.payload.numel()))
            message = steps.send(message.payload)
    except StopIteration as stop:
        assert stop.value.shape == (3,) and stop.value.dtype == torch.int32
    assert sent == [(torch.int16, 27), (torch.int8, 381), (torch.int8, 3), (torch.int8, 381)]
    assert sum(context.dealt.values()) == crest_cost(valid).offline
    assert 2 * sum(count * dtype.itemsize for dtype, count in sent) == crest_cost(valid).online
