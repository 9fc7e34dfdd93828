"""Activations by cosines: places, masks, ends, and how close they come."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergec.runtime.kernels.turns import TURNED
from mergec.runtime.ops.gelu import GELU, GELU_TANH
from mergec.runtime.ops.silu import SILU
from mergec.runtime.protocols.saturate import Function
from mergec.runtime.protocols.waves import Waves, wave_table
from tests.protocols.harness import words
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
