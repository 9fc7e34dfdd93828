"""Gated units by one opening: places, masks, numbers of fractional bits, words, what is seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.values import Shared
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.turns import FRAC, TURNED
from mergec.runtime.ops.glu import ACTIVATIONS, FUNCTIONS, gated_table
from mergec.runtime.ops.silu import SILU_BEND
from mergec.runtime.protocols.gated import (
    _CORRECTED,
    _VALUES,
    OUT_FRAC,
    SPANS,
    Gated,
    gated,
    gated_cost,
)
from mergec.runtime.protocols.saturate import function_input
from mergec.runtime.protocols.truncate import Truncation, truncation_parts
from mergec.runtime.protocols.waves import Waves
from tests.protocols.harness import run, uniform_bytes, words

UNIT = 2.0**-16
EVERY_SPAN = pytest.mark.parametrize("span", SPANS)
EVERY_ACT = pytest.mark.parametrize("act", FUNCTIONS)

SMALL = Waves(lambda x: np.cos(3 * x) / 4, 1, 2**13 + 1, (0, 0, 0, 0, -2, -4))
"""An even function on one unit to either side."""


def _evaluate(
    table: Gated, gate: torch.Tensor, up: torch.Tensor, frac: int = 16
) -> tuple[torch.Tensor, torch.Tensor, Simulation]:
    """Results for units of g; and `up` as its shares state it."""
    simulation = Simulation(record=True)
    gates = simulation.share(gate.double() * UNIT, frac)
    ups = simulation.share(up, table.frac)

    def protocol(ctx, party):
        return (yield from gated(ctx, table, function_input(ctx, gates[party]), ups[party]))

    found, cost = run(simulation, protocol)
    assert cost == gated_cost(table, len(gate)) and cost.rounds == 1
    assert simulation.to_client.total == 0
    stated = (up * 2.0**table.frac).round() * 2.0**-table.frac
    return found.double() * 2.0**-OUT_FRAC, stated, simulation


def _excess(
    found: torch.Tensor, active: torch.Tensor, up: torch.Tensor, cut: float = 0.0
) -> torch.Tensor:
    """Error over its bound: that of the cosines, of `up`, and of what was cut off of the gate."""
    unit = 1.5 * 2.0**-15
    bound = (3e-5 + 1.1 * cut) * (up.abs() + unit) + unit * active.abs() + 2.0**-31
    return (found - active * up).abs() / bound


def _factors(count: int, frac: int) -> torch.Tensor:
    """Numbers of all sizes that the ring holds, and that products with the gate leave room for."""
    largest = min(2.0 ** (62 - frac) * 0.99, 2.0**20)
    signs = words(count, 0, 2, seed=1) * 2 - 1
    sizes = torch.linspace(math.log2(largest) - 40, math.log2(largest), count).double()
    return (signs * 2.0**sizes)[torch.randperm(count, generator=torch.Generator().manual_seed(2))]


@EVERY_ACT
@EVERY_SPAN
def test_all_of_the_table_and_its_ends(act: str, span: int) -> None:
    table, end = gated_table(act, span, 54), span * 2**16
    x = torch.cat([words(20_000, -end, end + 1), torch.tensor([-end, 1 - end, 0, -1, 1, end])])
    found, up, _ = _evaluate(table, x, _factors(len(x), 54))
    assert _excess(found, ACTIVATIONS[act](x.double() * UNIT), up).max() < 1


@pytest.mark.parametrize("frac", range(63))
def test_every_number_of_fractional_bits_of_the_factor(frac: int) -> None:
    table, end = gated_table("silu", 48, frac), 48 * 2**16
    x = torch.cat([words(500, -end, end + 1), torch.tensor([-end, 0, end])])
    found, up, _ = _evaluate(table, x, _factors(len(x), frac))
    assert _excess(found, torch.nn.functional.silu(x.double() * UNIT), up).max() < 1
    assert table.narrow == (frac >= 47)
    assert table.shift == (1 if frac < 16 else frac - 15 - 32 * (frac >= 47))


@pytest.mark.parametrize("frac", [17, 31, 48])
def test_a_gate_with_more_bits_than_are_read(frac: int) -> None:
    table, end = gated_table("gelu_tanh", 64, 52), 64 * 2**16
    x = words(2000, -end + 2, end - 1)
    found, up, _ = _evaluate(table, x, _factors(len(x), 52), frac)
    active = ACTIVATIONS["gelu_tanh"](x.double() * UNIT)
    assert _excess(found, active, up, cut=UNIT).max() < 1


def test_every_number_of_a_small_table() -> None:
    table = Gated(SMALL, 20)
    x = torch.arange(-(2**16), 2**16 + 1)
    active = x.double() * UNIT / 2 + torch.cos(3 * x.double() * UNIT) / 4
    for factor in (1.0, -0.75, 2.0**18):
        found, up, _ = _evaluate(table, x, torch.full((len(x),), factor, dtype=torch.float64))
        assert _excess(found, active, up).max() < 1


@pytest.mark.parametrize("frac", [16, 30, 46, 47, 62])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_every_kind_of_mask(act: str, frac: int) -> None:
    """Of both openings at the ends of their rings, against each other, in the clear.

    The even part alone: the words of the rest are products of two openings' parts.
    """
    table = gated_table(act, 48, frac)
    least = 2**31 if table.narrow else 2**63
    edges = [0, 1, -1, least - 1, -least, least // 2, -least // 2, 12345]
    dtype = torch.int32 if table.narrow else torch.int64
    factor_masks = torch.tensor(edges).to(dtype)
    gate_masks = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 2**30], dtype=torch.int32)
    places = torch.linspace(-48, 48, 7).double() / UNIT
    ups = torch.tensor([-1.0, -0.37, 0.0, 0.37, 1.0]).double() * min(2.0 ** (61 - frac), 2.0**20)
    grid = torch.meshgrid(
        *(torch.arange(len(each)) for each in (factor_masks, gate_masks, places, ups)),
        indexing="ij",
    )
    s, r, place, up = (index.reshape(-1) for index in grid)
    x, u = places.round().long()[place], ups[up]
    drop = frac - 15 if frac >= 16 else 1
    whole = (u * 2.0**frac).round()
    word = torch.floor(whole / 2.0**32) if table.narrow else whole
    offset = 2**30 if table.narrow else 2**62
    opened = word.long().to(dtype) + torch.tensor(offset).to(dtype) + factor_masks[s]
    share = words(len(x) * table.row_bytes, 0, 256).to(torch.uint8).view(len(x), -1)
    own, total = share.clone(), torch.zeros(len(x), dtype=torch.int64)
    turned = TURNED(gate_masks[r].long(), table.curve.cycles, np.full(table.terms, FRAC))
    _CORRECTED(own, table.words(turned), truncation_parts(factor_masks[s], table.shift), table)
    basis = TURNED(x + gate_masks[r].long(), table.curve.cycles, table.basis_bits)
    factor = Truncation(opened, table.shift)
    for part in (share, own):
        out = torch.zeros(len(x), dtype=torch.int64)
        _VALUES(part, basis, factor.base, factor.wrap, table, out)
        total += out
    gate = x.double() * UNIT
    mean = float(table.curve.fitted[0])
    even = ACTIVATIONS[act](gate) - gate / 2 - mean
    stated = torch.floor(whole / 2.0**drop) * 2.0**-15
    assert _excess(total.double() * 2.0**-OUT_FRAC, even, stated).max() < 1


@pytest.mark.parametrize("value", [0.0, -3.25, 700.0])
@pytest.mark.parametrize("frac", [32, 54])
def test_what_is_seen_is_uniform_and_of_one_shape(value: float, frac: int) -> None:
    """Also for a gate beyond the table; both openings, and what the server is dealt."""
    table, count = gated_table("silu", 48, frac), 1500
    x = torch.full((count,), round(value / UNIT))
    _, _, simulation = _evaluate(table, x, torch.full((count,), 1.5, dtype=torch.float64))
    assert len(simulation.transcript) == 4
    assert abs(uniform_bytes(simulation.transcript)) < 6.5
    assert simulation.to_server.total == count * table.dealt_bytes
    ctx = ShapeContext()
    ghost = torch.empty((count,), dtype=torch.int64, device="meta")
    steps = gated(ctx, table, function_input(ctx, Shared(ghost, 16)), Shared(ghost, frac))
    sizes = [message.payload.nbytes for message in next(steps)]
    assert sum(sizes) * 2 == gated_cost(table, count).online


def test_the_server_is_dealt_uniform_bytes() -> None:
    """The same input again and again, and words of which most are small."""
    simulation = Simulation()
    sent: list[torch.Tensor] = []
    write = simulation.to_server.write
    simulation.to_server.write = lambda data: (sent.append(data.clone()), write(data))[1]
    table = gated_table("silu", 80, 54)
    x = simulation.share(torch.full((700,), 0.5), 16)
    y = simulation.share(torch.full((700,), 2.0), 54)
    run(simulation, lambda ctx, p: gated(ctx, table, function_input(ctx, x[p]), y[p]))
    assert abs(uniform_bytes(sent)) < 6.5


@EVERY_SPAN
def test_coefficients_are_below_what_parties_divide_their_bits_by(span: int) -> None:
    """Only the dealer uses a fit, and sizes are rounded up from logarithms far from whole ones."""
    for act in FUNCTIONS:
        curve = gated_table(act, span, 54).curve
        assert (np.abs(curve.fitted[1:]) <= 2.0 ** np.array(curve.sizes)).all()
    found = np.array(SILU_BEND.log_sizes(SILU_BEND.curve(span).cycles))
    assert np.abs(found - np.rint(found)).min() > 1e-4


def test_bytes_that_the_server_is_dealt() -> None:
    """72 for g/2; of each word 8 and what its cosine takes, of the third 25 bits fewer."""
    found = {
        (act, span): gated_table(act, span, 54).dealt_bytes for act in FUNCTIONS for span in SPANS
    }
    assert [found["silu", span] for span in (48, 64, 80)] == [2196, 2684, 3164]
    assert [found["gelu", span] for span in (48, 64, 80)] == [2208, 2808, 3396]
    table = gated_table("silu", 48, 54)
    assert [[(p.position, p.size) for p in planes] for planes in table.planes] == [
        [(0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (8, 4)],
        [(0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (8, 4)],
        [(0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (8, 1)],
    ]
    assert table.factor_bits == 25


def test_what_no_table_can_be_made_of() -> None:
    with pytest.raises(ValueError, match="no table serves gates up to 50"):
        gated_table("silu", 50, 54)
    curve = gated_table("silu", 48, 54).curve
    for frac in (-1, 63):
        with pytest.raises(ValueError, match=f"no factor has {frac} fractional bits"):
            Gated(curve, frac)
    for sizes in ((9, 8), (1, 2)):
        with pytest.raises(ValueError, match="must decrease"):
            Gated(Waves(SMALL.even, 1, 100, sizes), 16)
    assert Gated(Waves(SMALL.even, 1, 100, (8, 8)), 16).terms == 4
