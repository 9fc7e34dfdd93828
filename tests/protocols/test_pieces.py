"""Tables that only the server is sent: all places of windows, all masks of a small domain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mergec.runtime.core.context import (
    ClientContext,
    DealerContext,
    ServerContext,
    ShapeContext,
)
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops.gelu import GELU, GELU_TANH
from mergec.runtime.ops.silu import SILU
from mergec.runtime.protocols import pieces as one_sided
from mergec.runtime.protocols.pieces import Exponential, Pieces
from mergec.runtime.protocols.saturate import (
    REACHES,
    Function,
    Tail,
    apply,
    function_input,
    reach_for,
    saturating,
    supplies_of,
)
from mergec.runtime.protocols.waves import Waves
from tests.protocols.harness import run, uniform_bytes, words

UNIT = 2.0**-16


def table_of(function: Function) -> Pieces:
    """The table of an activation of which the client is dealt nothing."""
    table = function.from_server(REACHES[0]).table
    assert isinstance(table, Pieces)
    return table


def waves_of(table: Pieces) -> Waves:
    assert isinstance(table.curve, Waves)
    return table.curve


def evaluated(pieces: Pieces, x: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
    """f(x) of integers x [n], under random masks, or under given ones, which the client knows."""
    simulation = Simulation()
    drawn: dict[int, torch.Tensor] = {}

    def protocol(ctx, p):
        yield from ()
        # The dealer runs first, so that its mask exists when the parties look up.
        drawn[p] = ctx.mask(x.shape, torch.int32)
        if masks is not None:
            drawn[p] = masks if p != 1 else torch.zeros_like(masks)
        opened = x.to(torch.int32) + drawn[2]
        return pieces.evaluate(ctx, opened if p < 2 else opened.to("meta"), drawn[p])

    result, cost = run(simulation, protocol)
    assert cost == pieces.cost(len(x))
    assert simulation.to_client.total == 0
    return result.double() * 2.0**-pieces.out_frac


@pytest.mark.parametrize("start", [-7 * 64, -100, 37])
def test_every_value_of_a_small_domain_under_every_mask(start: int) -> None:
    """Windows of 64 units: each place of a window, with each turn and each low part of a mask."""
    pieces = Pieces(Exponential(), start, 8, 6, (6,), 4)
    domain, masks = torch.arange(start, start + pieces.span + 1), torch.arange(8 * 64)
    x, r = (grid.reshape(-1) for grid in torch.meshgrid(domain, masks, indexing="ij"))
    exact = torch.exp(x.double() * UNIT)
    assert (evaluated(pieces, x, r.to(torch.int32)) - exact).abs().max() < 1e-5


def test_roles_may_take_tables_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    table, x = table_of(SILU), words(100, -(15 << 16), 15 << 16)
    found = []
    for sizes in ((2048, 2048, 2048), (7, 33, 64)):
        simulation = Simulation()
        to_server = simulation.to_server
        simulation.contexts = (
            ClientContext(bytes(32), simulation.to_client),
            ServerContext(bytes([1] * 32), to_server),
            DealerContext(bytes(32), bytes([1] * 32), simulation.to_client, to_server),
        )

        def protocol(ctx, p, sizes=sizes):
            yield from ()
            monkeypatch.setattr(one_sided._VALUES, "together", (sizes[p], sizes[p]))
            mask = ctx.mask(x.shape, torch.int32)
            opened = x.to(torch.int32)
            return table.evaluate(ctx, opened if p < 2 else opened.to("meta"), mask)

        found.append([*simulation.run(protocol)[:2], torch.tensor(to_server.total)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("step_bits", [3, 9, 12, 18])
def test_exponentials_of_every_place_of_a_window(step_bits: int) -> None:
    size = 2**step_bits
    pieces = Pieces(Exponential(), -6 * size, 8, step_bits, (6,), 4 if step_bits < 18 else 8)
    x = torch.arange(-6 * size, size + 1, max(1, size >> 13))
    exact = torch.exp(x.double() * UNIT)
    # As a part of the value where it is above 1: a softmax divides by a row's largest.
    assert ((evaluated(pieces, x) - exact).abs() / exact.clamp(min=1)).max() < 1e-5


@pytest.mark.parametrize(
    ("width", "integer_bits", "step_bits", "bits"),
    [
        # 40 bits, where exp is 2**-5.77 at the other end of a window of four; and as many of one.
        (6, 8, 18, 17),
        (6, 8, 16, 19),
        (4, 24, 18, 1),
        (8, 4, 6, 29),
    ],
)
def test_bits_are_divided_between_a_word_and_a_power(
    width: int, integer_bits: int, step_bits: int, bits: int
) -> None:
    """So that half a unit of either costs the same; public numbers have 29 bits at most."""
    pieces = Pieces(Exponential(), 0, 8, step_bits, (width,), integer_bits)
    assert pieces.basis_bits.tolist() == [bits]
    assert pieces.scales.tolist() == [2.0 ** (8 * width - integer_bits - bits)]


@pytest.mark.parametrize("frac", [16, 17, 31, 32, 47, 48])
@pytest.mark.parametrize("reach", [REACHES[0], 9, REACHES[-1]])
@pytest.mark.parametrize(
    ("function", "reference"),
    [(SILU, torch.nn.functional.silu), (GELU, torch.nn.functional.gelu)],
    ids=["silu", "gelu"],
)
def test_functions_are_right_up_to_their_reach(
    function: Function, reference: Callable[..., torch.Tensor], reach: int, frac: int
) -> None:
    served = function.from_server(reach)
    end = 2.0**reach - 16
    places = torch.tensor(
        [-end, -end / 2, -16, -15, -14, -7, -5, 0, 5, 7, 13, 14, 15, 16, end / 2, end]
    )
    near = torch.arange(-2, 3).double() * UNIT
    x = torch.cat([(places[:, None] + near).reshape(-1), words(2000, -(2**20), 2**20) * UNIT])
    x = x[x.abs() <= end]
    simulation = Simulation()
    views = simulation.share(x, frac)
    found, _ = run(simulation, lambda ctx, p: apply(ctx, served, function_input(ctx, views[p]), 16))
    assert simulation.to_client.total == 0
    # Bits beyond 16 are rounded off the input.
    assert (found.double() * UNIT - reference(x)).abs().max() < (3e-5 if frac == 16 else 5e-5)


def test_a_reach_has_room_for_eight_times_what_was_seen() -> None:
    assert reach_for(0.0) == REACHES[0]
    for reach in REACHES:
        assert reach_for((2**reach - 16) / 8) == reach
    assert reach_for((2 ** REACHES[-1] - 15) / 8) == 0
    assert SILU.from_server(0) is SILU
    for reach in (-1, 5, 12, 60):
        with pytest.raises(ValueError, match="no table for inputs up to"):
            SILU.from_server(reach)
    with pytest.raises(ValueError, match="no table"):
        SILU.from_server(8).from_server(8)


def test_dealt_ahead_are_tables_of_the_reach_and_keys() -> None:
    """Keys serve where a program is asked for exact rounding, or reads further."""
    assert list(supplies_of(9)) == [{"reach": 0}, {"reach": 9}]
    assert list(supplies_of(0)) == [{"reach": 0}]


def test_an_end_lies_between_two_windows() -> None:
    """So a unit in which ends are stated must be as large as a window."""
    left, right = Tail(0.0, -1.0), Tail(0.0, 1.0)
    made = saturating(np.tanh, -8.0, 64, 14, 57, 14, left, right)
    assert made.thresholds == [1, 63]
    with pytest.raises(ValueError, match=r"units of 2\*\*13 cut windows of 2\*\*14"):
        saturating(np.tanh, -8.0, 64, 14, 57, 13, left, right)


def test_what_the_server_is_sent_is_uniform() -> None:
    """Whatever the masks are: here all equal, and on both edges of a window."""
    for function, masks in ((SILU, 0), (GELU, 2**17), (SILU, -1), (GELU_TANH, 2**31 - 1)):
        table = table_of(function)
        simulation = Simulation()
        dealer = simulation.contexts[2]
        mask = torch.full((2048,), masks, dtype=torch.int32)
        table.evaluate(dealer, mask.to("meta"), mask)
        sent = simulation.to_server.read(2048 * table.dealt_bytes)
        assert abs(uniform_bytes([sent])) < 6.5
        # So is the difference of two neighbouring elements, whose entries are the same.
        rows = sent.reshape(2048, -1)
        assert abs(uniform_bytes([rows[1:] - rows[:-1]])) < 6.5


def test_shapes_alone_take_the_same_bytes() -> None:
    context = ShapeContext()
    mask = context.mask((5000,), torch.int32)
    table = table_of(SILU)
    assert table.evaluate(context, mask, mask).shape == mask.shape
    assert context.dealt == {"client": 0, "server": table.cost(5000).offline}


@pytest.mark.parametrize(
    ("windows", "step_bits", "widths"),
    [
        (3, 8, (4,)),
        (0, 8, (4,)),
        (8, 0, (4,)),
        (8, 33, (4,)),
        (8, 8, (3,)),
        (8, 8, (9,)),
        (8, 8, (4, 4)),
        (2, 8, (5,)),
    ],
)
def test_a_table_that_kernels_do_not_take_raises(
    windows: int, step_bits: int, widths: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"windows|bytes"):
        Pieces(Exponential(), 0, windows, step_bits, widths, 4)


def test_an_exponential_of_a_wide_window_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pieces = Pieces(Exponential(), 0, 4, 19, (6,), 12)
        pieces.curve.basis(pieces, torch.zeros(1, dtype=torch.int64))
