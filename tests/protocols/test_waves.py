"""Activations by cosines: places, masks, ends, and how close they come."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergec.runtime.core.values import Shared
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.turns import TURNED
from mergec.runtime.ops.gelu import (
    ALONE_FRAC,
    GELU,
    GELU_BEND,
    GELU_TANH,
    GELU_TANH_BEND,
    alone_table,
)
from mergec.runtime.ops.silu import SILU
from mergec.runtime.protocols.pieces import Pieces
from mergec.runtime.protocols.saturate import Function, function_input
from mergec.runtime.protocols.waves import (
    Waves,
    evaluate_alone,
    evaluate_alone_cost,
    wave_table,
)
from tests.protocols.harness import run, uniform_bytes, words
from tests.protocols.test_pieces import UNIT, evaluated, table_of, waves_of

ACTIVATIONS = pytest.mark.parametrize(
    "function", [SILU, GELU, GELU_TANH], ids=["silu", "gelu", "gelu_tanh"]
)
REFERENCES = {
    SILU: torch.nn.functional.silu,
    GELU: torch.nn.functional.gelu,
    GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@ACTIVATIONS
def test_the_tables_of_activations(function: Function) -> None:
    """A million places and the ends; beyond the ends a result is of another input, but no crash."""
    table = table_of(function)
    low, high = table.start, table.start + table.span
    x = torch.cat([words(2**20, low, high + 1), torch.tensor([low, low + 1, 0, high - 1, high])])
    exact = REFERENCES[function](x.double() * UNIT)
    assert (evaluated(table, x) - exact).abs().max() < 1e-5
    # The upper half of a word must hold it with two bits to spare, where the table is used.
    inside = (x - low) >> 17 < table.span >> 17
    assert exact[inside].abs().max() + 1e-5 < 2.0 ** (table.integer_bits - 2)
    evaluated(table, words(1000, -(2**31), 2**31))


@ACTIVATIONS
def test_a_tail_takes_over_where_the_function_is_nearly_a_line(function: Function) -> None:
    """The unit in which an end is stated may belong to the table or to the tail."""
    served = function.from_server(9)
    unit = 2**served.end_bits
    left = torch.arange(table_of(function).start, table_of(function).start + unit).double() * UNIT
    right = -left
    assert REFERENCES[function](left).abs().max() < 1.2e-5
    assert (REFERENCES[function](right) - right).abs().max() < 1.2e-5


@ACTIVATIONS
def test_every_kind_of_mask(function: Function) -> None:
    """Masks at the ends of the ring, and around each half turn of the longest wave."""
    table = table_of(function)
    period = 2.0**32 / waves_of(table).cycles
    turns = [round(period * k / 8) for k in range(9)]
    masks = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), *turns, *(t + 1 for t in turns)])
    places = torch.linspace(table.start, table.start + table.span, 257).round().long()
    x, r = (grid.reshape(-1) for grid in torch.meshgrid(places, masks, indexing="ij"))
    exact = REFERENCES[function](x.double() * UNIT)
    assert (evaluated(table, x, r.to(torch.int32)) - exact).abs().max() < 1e-5


@ACTIVATIONS
def test_coefficients_are_below_what_parties_divide_their_bits_by(function: Function) -> None:
    """Only the dealer uses a fit, so that it need not be the same on all machines."""
    curve = waves_of(table_of(function))
    assert (np.abs(curve.fitted[1:]) <= 2.0 ** np.array(curve.sizes)).all()


@ACTIVATIONS
def test_cosines_come_as_close_as_is_stated(function: Function) -> None:
    """Less than 4e-6 off everywhere on the table, by 20 cosines for SiLU and 9 for GELU."""
    curve = waves_of(table_of(function))
    assert len(curve.sizes) == (20 if function is SILU else 9)
    x = np.linspace(0, curve.half, 100_001)
    multiples = np.arange(1, 2 * len(curve.sizes), 2)
    waves = np.cos(2 * np.pi * curve.cycles * 2.0**-16 * np.outer(x, multiples))
    assert np.abs(curve.fitted[0] + waves @ curve.fitted[1:] - curve.even(x)).max() < 4e-6


@ACTIVATIONS
def test_bits_are_divided_between_dealt_and_public_numbers(function: Function) -> None:
    """So that half a unit of either costs the same: each as fine as the other one is large."""
    table = table_of(function)
    bits = 8 * np.array(table.widths) - table.integer_bits
    excess = 2 * table.basis_bits - bits - np.repeat(waves_of(table).sizes, 2)
    assert np.abs(excess).max() <= 1
    assert np.array_equal(table.scales, 2.0 ** (bits - table.basis_bits))


ALONE = pytest.mark.parametrize("reach", [6, 7])
FORMS = pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])


def by_one_opening(simulation: Simulation, table: Pieces, x: list[Shared]) -> torch.Tensor:
    def protocol(ctx, party):
        return (yield from evaluate_alone(ctx, table, function_input(ctx, x[party])))

    found, cost = run(simulation, protocol)
    assert cost == evaluate_alone_cost(table, found.numel())
    assert cost.rounds == 1
    assert simulation.to_client.total == 0
    return found.double() * 2.0**-table.out_frac


@ALONE
@FORMS
@pytest.mark.parametrize("frac", [16, 31, 48])
def test_a_gelu_by_one_opening(tanh: bool, reach: int, frac: int) -> None:
    """Of places in all of the table, and its ends; with fewer and more bits than it reads."""
    table = alone_table(tanh, reach)
    assert table.out_frac == ALONE_FRAC
    low, high = table.start, table.start + table.span
    x = torch.cat([words(2**17, low, high + 1), torch.tensor([low, low + 1, 0, high - 1, high])])
    exact = torch.nn.functional.gelu(x.double() * UNIT, approximate="tanh" if tanh else "none")
    simulation = Simulation()
    shares = simulation.share(x.double() * UNIT, frac)
    # Dropping bits of a share of more is off by a unit of x, and GELU rises by up to 1.13 of it.
    bound = 6e-5 if frac <= 16 else 6e-5 + 1.13 * UNIT
    assert (by_one_opening(simulation, table, shares) - exact).abs().max() < bound
    beyond = words(1000, -(2**30), 2**30).double() * UNIT
    by_one_opening(simulation, table, simulation.share(beyond, frac))


@ALONE
def test_one_opening_tells_nothing(reach: int) -> None:
    """What both parties receive is uniform for one input, given again and again."""
    simulation = Simulation(record=True)
    shares = simulation.share(torch.full((4096,), -3.25), 16)
    by_one_opening(simulation, alone_table(True, reach), shares)
    assert len(simulation.transcript) == 2
    assert abs(uniform_bytes(simulation.transcript)) < 6.5


@ALONE
@FORMS
def test_sizes_of_coefficients_are_the_same_on_all_machines(tanh: bool, reach: int) -> None:
    """They are rounded up from logarithms, none of which is near a whole number."""
    curve = waves_of(alone_table(tanh, reach))
    assert (np.abs(curve.fitted[1:]) <= 2.0 ** np.array(curve.sizes)).all()
    found = np.array((GELU_TANH_BEND if tanh else GELU_BEND).log_sizes(curve.cycles))
    assert np.abs(found - np.rint(found)).min() > 1e-3


def test_no_table_serves_inputs_that_reach_further() -> None:
    with pytest.raises(ValueError, match=r"up to 2\*\*8 by one opening"):
        alone_table(True, 8)


def test_every_number_of_a_small_range() -> None:
    """One unit of x to either side, with waves that are not those of an activation."""
    curve = Waves(lambda x: np.cos(3 * x) / 4, 1, 2**13 + 1, (0, 0, 0, 0, 0, 0, 0, 0))
    table = wave_table(curve, (7,) * 8, 4)
    x = torch.arange(-(2**16), 2**16 + 1)
    exact = x.double() * UNIT / 2 + torch.cos(3 * x.double() * UNIT) / 4
    assert (evaluated(table, x) - exact).abs().max() < 1e-6


def test_sines_and_cosines() -> None:
    """Of all quarters and their ends, and for phases of any number of turns."""
    phase = torch.cat([torch.arange(-8, 9) * 2**29, words(5000, -(2**62), 2**62)])
    found = TURNED(phase, 1, np.full(12, 30)).double() * 2.0**-30
    angle = (phase & (2**32 - 1)).double() * (2 * math.pi / 2**32)
    for k in range(6):
        assert (found[:, 2 * k] - torch.cos((2 * k + 1) * angle)).abs().max() < 1e-7
        assert (found[:, 2 * k + 1] - torch.sin((2 * k + 1) * angle)).abs().max() < 1e-7
    coarse = TURNED(phase, 1, np.array([1, 2])) * 2.0 ** -torch.tensor([1.0, 2.0])
    assert (coarse - found[:, :2]).abs().max() <= 0.25 + 1e-7
