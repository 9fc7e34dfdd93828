"""Softmax weights by the logarithm of the sum: rows of every length, ends, ties, what is seen."""

from __future__ import annotations

import math

import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.values import Held, Shared
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.long import added
from mergec.runtime.ops.attention import Attention
from mergec.runtime.protocols.finer import HALVES
from mergec.runtime.protocols.opening import open_masked
from mergec.runtime.protocols.probabilities import (
    LONGEST,
    WAYS,
    ByLogarithm,
    probabilities,
    probabilities_cost,
)
from mergec.runtime.protocols.rows import LOG, logarithm_called, shift_of_many
from tests.protocols.harness import uniform_bytes
from tests.protocols.test_logarithm import numbers

FRAC = 24
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def _weights(
    x: torch.Tensor, way: ByLogarithm, frac: int, valid: torch.Tensor | None = None, out: int = FRAC
) -> torch.Tensor:
    """The softmax of rows with so many fractional bits; float64."""
    simulation = Simulation()
    views = simulation.share(x, frac)
    valid = torch.ones(x.shape, dtype=torch.bool) if valid is None else valid
    results = simulation.run(lambda ctx, p: probabilities(ctx, views[p], valid, way, out))
    assert simulation.cost == probabilities_cost(valid, way, out) and simulation.cost.rounds == 3
    client, server, dealer = results
    assert dealer.is_meta and dealer.shape == client.shape == (*x.shape, HALVES)
    total = added(client.reshape(-1, HALVES), server.reshape(-1, HALVES))
    ring = 1 << (32 * HALVES)
    whole = [n - ring if n >= ring // 2 else n for n in numbers(total)]
    return torch.tensor(whole, dtype=torch.float64).reshape(x.shape) * 2.0**-out


def _check(
    x: torch.Tensor, way: ByLogarithm, frac: int, valid: torch.Tensor | None = None, out: int = FRAC
) -> torch.Tensor:
    """Less than a unit off, 2**-27, and 2**-14 of the value; returns errors."""
    found = _weights(x, way, frac, valid, out)
    shown = x if valid is None else x.where(valid, -math.inf)
    exact = torch.softmax(shown, -1)
    error = found - exact
    assert bool((error.abs() <= 2.0**-out + 2.0**-27 + exact * 2.0**-14).all())
    assert float(found.min()) >= 0
    if valid is not None:
        assert bool((found[~valid] == 0).all())
    return error


def _rows(count: int, length: int, way: ByLogarithm, frac: int, seed: int = 0) -> torch.Tensor:
    """Random rows of any spread up to the bound, as numbers with `frac` bits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, length, dtype=torch.float64, generator=generator)
    x *= torch.logspace(-3, math.log10(way.spread), count, dtype=torch.float64)[:, None]
    x = torch.minimum(x, x.amin(1, keepdim=True) + way.spread)
    return (x * 2.0**frac).floor() * 2.0**-frac


@every_way
@pytest.mark.parametrize("length", [1, 2, 128, 4096])
def test_rows_of_any_length_and_spread(way: ByLogarithm, length: int) -> None:
    _check(_rows(40 if length < 200 else 8, length, way, 32), way, 32)


@every_way
@pytest.mark.parametrize("frac", range(16, 49))
def test_every_number_of_fractional_bits(way: ByLogarithm, frac: int) -> None:
    """Wherever the row lies in the ring."""
    for offset in (0.0, 2.0 ** (61 - frac), -(2.0 ** (61 - frac)), 700.25):
        _check(_rows(6, 5, way, 16) + min(offset, 2.0**30), way, frac)


@pytest.mark.parametrize("out", range(1, 49))
def test_every_number_of_fractional_bits_of_a_weight(out: int) -> None:
    for way in (WAYS["log-6"], WAYS["log-9"]):
        _check(_rows(6, 5, way, 32), way, 32, out=out)


@every_way
def test_the_first_entry_may_be_any(way: ByLogarithm) -> None:
    """The largest, the smallest, and one in between, with others at both ends of the range."""
    steps = torch.linspace(0, way.spread, 41, dtype=torch.float64)
    for first in steps:
        x = torch.stack([first.expand(3), torch.tensor([0.0, way.spread, 0.0]).double(),
                         torch.tensor([way.spread, way.spread, 0.0]).double()], 1)  # fmt: skip
        _check((x * 2**20).floor() / 2**20, way, 20)
        _check((-x * 2**20).floor() / 2**20, way, 20)


@every_way
def test_the_longest_row_at_the_ends_of_the_range(way: ByLogarithm) -> None:
    """All but one at one end: the largest sum, and the smallest weights that are not below it."""
    x = torch.full((4, LONGEST), way.spread, dtype=torch.float64)
    x[0, 0] = x[1, -1] = 0.0
    x[2, 1:] = 0.0
    x[3] = 0.0
    _check(x, way, 16)


@every_way
def test_all_numbers_of_a_small_domain(way: ByLogarithm) -> None:
    """Every pair of entries 1/64 apart up to 16, and every 1/2**16 beside zero."""
    steps = torch.arange(-16 * 64, 16 * 64 + 1).double() / 64
    _check(torch.stack([torch.zeros_like(steps), steps], 1), way, 16)
    units = torch.arange(-600, 601).double() / 2**16
    _check(torch.stack([torch.zeros_like(units), units, units], 1), way, 16)


@every_way
def test_rows_with_different_valid_entries(way: ByLogarithm) -> None:
    x = _rows(9, 30, way, 32, seed=2)
    valid = torch.ones(x.shape, dtype=torch.bool).tril(3)
    valid[4, :2] = False
    _check(x, way, 32, valid)


def test_weights_have_the_right_expectation() -> None:
    """Also those of less than a unit, of which a long row has many."""
    way, count = WAYS["log-7"], 4000
    for gap in (0.0, 3.3, 16.0, 18.5):
        x = torch.tensor([[0.0, -gap]], dtype=torch.float64).repeat(count, 1)
        errors = _check(x, way, 32)[:, 1]
        unit = 2.0**-FRAC
        value = math.exp(-gap) / (1 + math.exp(-gap))
        # A rounding is off by half a unit at random; entries and sums are cut at 2**-16.
        bound = 5 * 0.5 * unit / math.sqrt(count) + value * 2.0**-16
        assert abs(float(errors.mean())) < bound


@pytest.mark.parametrize("spread", [0.0, 5.0, 250.0, 900.0])
def test_what_is_seen_is_uniform_and_of_one_shape(spread: float) -> None:
    """Also of rows that spread too far."""
    way, rows, length = WAYS["log-8"], 20, 60
    x = torch.linspace(0, spread, length, dtype=torch.float64).repeat(rows, 1)
    simulation = Simulation(record=True)
    views, valid = simulation.share(x, 32), torch.ones(x.shape, dtype=torch.bool)
    sent, kept = simulation.to_server, []
    write = sent.write
    sent.write = lambda data: (kept.append(data.clone()), write(data))[1]  # type: ignore[method-assign]
    simulation.run(lambda ctx, p: probabilities(ctx, views[p], valid, way, FRAC))
    size, halves = rows * length, way.logarithm.halves
    shapes = [(size,), (size,), (rows, halves), (rows, halves), (size,), (size,)]
    assert [tuple(payload.shape) for payload in simulation.transcript] == shapes
    for opened in simulation.transcript:
        assert abs(uniform_bytes([opened])) < 6.5
    for one, other in zip(simulation.transcript[::2], simulation.transcript[1::2], strict=True):
        both = added(*(payload.reshape(len(payload), -1) for payload in (one, other)))
        assert abs(uniform_bytes([both])) < 6.5
    tables = [size * way.sums.dealt_bytes, size * way.weights(FRAC).dealt_bytes]
    assert [len(kept[0]), len(kept[-1])] == tables
    for data in (kept[0], kept[-1]):
        assert abs(uniform_bytes([data])) < 6.5


def test_shapes_alone_take_the_same_bytes() -> None:
    for way in WAYS.values():
        for length in (1, 130):
            context, valid = ShapeContext(), torch.ones(2, length, dtype=torch.bool)
            share = torch.empty((2, length), dtype=torch.int64, device="meta")
            rounds = list(probabilities(context, Shared(share, 32), valid, way, FRAC))
            cost = probabilities_cost(valid, way, FRAC)
            assert len(rounds) == cost.rounds
            key = 8 * way.logarithm.words * 2
            assert context.dealt == {"client": key, "server": cost.offline - key}


@every_way
def test_the_bounds_that_tables_rest_on(way: ByLogarithm) -> None:
    """Sums fit into the octaves and the ring; entries less the logarithm fit into the table."""
    spec, most = way.logarithm, way.spread + 2.0**-15
    assert math.log2(LONGEST) + most / math.log(2) < spec.octaves
    assert way.sums.kept >= spec.top > spec.low + spec.octaves
    table = way.weights(FRAC)
    assert table.start * 2.0**-16 < -most - math.log(LONGEST) - 1e-3
    assert way.sums.start * 2.0**-16 < -most and most < way.sums.top
    # A difference of scores, less the logarithm, is read from bit frac - 16 on.
    assert 64 - (spec.frac - 16) >= table.step_bits + 1


@pytest.mark.parametrize("name", LOG)
@pytest.mark.parametrize("new", [1, 8, 9])
@pytest.mark.parametrize("hides", [False, True])
def test_attention_takes_another_way_where_it_must(name: str, new: int, hides: bool) -> None:
    """Steps of many tokens, and those whose keys may be hidden."""
    make = torch.Generator().manual_seed(5)
    q = torch.randn(1, 4, new, 8, dtype=torch.float64, generator=make) / 4
    k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64, generator=make) for _ in range(2))
    bits = WAYS[name].bits
    simulation = Simulation()
    views = [simulation.share(x, 16) for x in (q, k, v)]
    masked = [simulation.run(lambda ctx, p, x=x: open_masked(ctx, x[p])) for x in views]
    pads = None
    arguments = (None, 0.5, 0.0, name, None, bits, pads)
    cost = Attention.cost(*(m[2] for m in masked), *arguments, fixed=16)
    hidden = torch.tensor([3])
    padded = (*arguments[:-1], hidden)
    other = Attention.cost(*(m[2] for m in masked), *padded, fixed=16)
    broad = (None, 0.5, 0.0, f"broad-{bits}", None, bits, None)
    plain = Attention.cost(*(m[2] for m in masked), *broad, fixed=16)
    assert other == plain
    if hides:
        return
    assert (cost.rounds < plain.rounds) == (new <= 8)
    assert (cost == plain) == (new > 8)
    simulation.cost = type(simulation.cost)()
    results = simulation.run(
        lambda ctx, p: Attention.protocol(ctx, *(m[p] for m in masked), *arguments)
    )
    assert simulation.cost == cost
    exact = Attention.reference(q, k, v, *arguments)
    assert (simulation.reveal(results) - exact).abs().max() < 3e-4


def test_which_ways_are_offered() -> None:
    for bits in range(6, 10):
        name, hidden = f"log-{bits}", Held(Vis.CLIENT, torch.zeros(1))
        assert list(Attention.far_variants({"reach": bits, "pads": None})) == [{"shift": name}]
        assert not Attention.far_variants({"reach": bits, "pads": hidden})
        assert logarithm_called(name, LONGEST, hides=False) == (name, WAYS[name])
        assert logarithm_called(name, LONGEST + 1, hides=False) == (f"broad-{bits}", None)
        assert logarithm_called(name, 3, hides=True) == (f"broad-{bits}", None)
        assert logarithm_called("pairs", 3, hides=False) == ("pairs", None)
        for length in (64, 300):
            assert shift_of_many(name, length) == shift_of_many(f"broad-{bits}", length)
    assert not Attention.far_variants({"reach": 0, "pads": None})
