"""Functions from tables of which the client is sent nothing: all places, masks and widths."""

from __future__ import annotations

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
from mergec.runtime.protocols.pieces import Exponential, Pieces, Polynomial
from mergec.runtime.protocols.saturate import (
    REACHES,
    Function,
    Tail,
    apply,
    function_input,
    reach_for,
    saturating,
)
from tests.protocols.harness import run, uniform_bytes, words

UNIT = 2.0**-16


def _sine(x: np.ndarray) -> np.ndarray:
    """One period of 2**11 units."""
    return np.sin(x * 2 * np.pi / (2048 * UNIT))


def _evaluate(pieces: Pieces, x: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
    """f(x) of integers x [n], under random masks, or under given ones at the dealer."""
    simulation = Simulation()
    drawn: dict[int, torch.Tensor] = {}

    def protocol(ctx, p):
        yield from ()
        # The dealer runs first, so that its mask exists when the parties look up.
        drawn[p] = ctx.mask(x.shape, torch.int32) if masks is None else masks
        opened = x.to(torch.int32) + drawn[2]
        return pieces.evaluate(ctx, opened if p < 2 else opened.to("meta"), drawn[p])

    result, cost = run(simulation, protocol)
    assert cost == pieces.cost(len(x))
    assert simulation.to_client.total == 0
    return result.double() * 2.0**-pieces.out_frac


@pytest.mark.parametrize("widths", [(4,) * 6, (5, 5, 4, 4, 4, 4), (4, 8, 7, 6, 5, 4), (8,) * 6])
def test_every_value_of_a_small_domain_under_every_mask(widths: tuple[int, ...]) -> None:
    """Windows of 64 units: each place of a window, with each turn and each low part of a mask."""
    pieces = Pieces(Polynomial(_sine, 5), -100, 8, 6, widths, 3)
    domain = torch.arange(-100, -100 + 7 * 64 + 1)
    masks = torch.arange(8 * 64)
    x, r = (grid.reshape(-1) for grid in torch.meshgrid(domain, masks, indexing="ij"))
    found = _evaluate(pieces, x, r.to(torch.int32))
    error = (found - torch.from_numpy(_sine(x.numpy() * UNIT))).abs()
    # The polynomial's own error is below 1e-9; a word of four bytes has 29 fractional bits, of
    # which its public function takes half.
    assert error.max() < (2e-4 if widths[1] == 4 else 2e-5 if widths[1] == 5 else 1e-5)


def test_a_window_is_of_any_size_and_begins_anywhere() -> None:
    for step_bits in (1, 4, 8, 9, 15):
        width = 2.0 ** (step_bits - 16)
        for start in (-(2**31), -7, 0, 2**31 - (2 << step_bits)):
            pieces = Pieces(
                Polynomial(lambda x, w=width: np.cos(x / w), 7), start, 4, step_bits, (6,) * 8, 4
            )
            x = start + words(3000, 0, 3 * 2**step_bits + 1)
            x[:2] = torch.tensor([start, start + 3 * 2**step_bits])
            wanted = torch.cos(x.double() * UNIT / width)
            # Beyond 2**31 the position wraps, and with it the public part of z.
            assert (_evaluate(pieces, x) - wanted).abs().max() < 1e-5


def test_roles_may_take_tables_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x = words(100, -(15 << 16), 15 << 16)
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
            monkeypatch.setattr(one_sided, "_TOGETHER", sizes[p])
            mask = ctx.mask(x.shape, torch.int32)
            opened = x.to(torch.int32)
            return SILU.pieces.evaluate(ctx, opened if p < 2 else opened.to("meta"), mask)

        found.append([*simulation.run(protocol)[:2], torch.tensor(to_server.total)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("step_bits", [3, 9, 12, 18])
def test_exponentials_of_every_place_of_a_window(step_bits: int) -> None:
    size = 2**step_bits
    pieces = Pieces(Exponential(), -6 * size, 8, step_bits, (6,), 4 if step_bits < 18 else 8)
    x = torch.arange(-6 * size, size + 1, max(1, size >> 13))
    exact = torch.exp(x.double() * UNIT)
    # As a part of the value where it is above 1: a softmax divides by a row's largest.
    assert ((_evaluate(pieces, x) - exact).abs() / exact.clamp(min=1)).max() < 1e-5


@pytest.mark.parametrize("function", [SILU, GELU, GELU_TANH], ids=["silu", "gelu", "gelu_tanh"])
def test_the_tables_of_activations(function: Function) -> None:
    """A million places and the ends; beyond the ends a result is of another input, but no crash."""
    pieces = function.pieces
    assert pieces is not None
    low = pieces.start
    high = low + (pieces.windows - 1) * 2**pieces.step_bits
    x = torch.cat([words(2**20, low, high + 1), torch.tensor([low, low + 1, 0, high - 1, high])])
    assert isinstance(pieces.curve, Polynomial)
    exact = torch.from_numpy(pieces.curve.function(x.double().numpy() * UNIT))
    assert (_evaluate(pieces, x) - exact).abs().max() < 1.5e-5
    # The upper half of a word must hold it with two bits to spare.
    assert exact.abs().max() < 2.0 ** (pieces.integer_bits - 2)
    _evaluate(pieces, words(1000, -(2**31), 2**31))


@pytest.mark.parametrize("frac", [16, 17, 31, 32, 47, 48])
@pytest.mark.parametrize("reach", [REACHES[0], 9, REACHES[-1]])
@pytest.mark.parametrize("function", [SILU, GELU], ids=["silu", "gelu"])
def test_functions_are_right_up_to_their_reach(function: Function, reach: int, frac: int) -> None:
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
    assert served.pieces is None and isinstance(function.pieces.curve, Polynomial)
    exact = torch.from_numpy(function.pieces.curve.function(x.numpy().clip(-700, None)))
    # Bits beyond 16 are rounded off the input.
    assert (found.double() * UNIT - exact).abs().max() < (3e-5 if frac == 16 else 5e-5)


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


def test_an_end_lies_between_two_windows() -> None:
    """So a unit in which ends are stated must be as large as a window."""
    left, right = Tail(0.0, -1.0), Tail(0.0, 1.0)
    made = saturating(np.tanh, -8.0, 64, 14, 57, 14, left, right)
    assert made.thresholds == [1, 63]
    with pytest.raises(ValueError, match=r"units of 2\*\*13 cut windows of 2\*\*14"):
        saturating(np.tanh, -8.0, 64, 14, 57, 13, left, right)


def test_what_the_server_is_sent_is_uniform() -> None:
    """Whatever the masks are: here all equal, and on both edges of a window."""
    for function, masks in ((SILU.pieces, 0), (GELU.pieces, 2**17), (SILU.pieces, -1)):
        simulation = Simulation()
        dealer = simulation.contexts[2]
        mask = torch.full((2048,), masks, dtype=torch.int32)
        function.evaluate(dealer, mask.to("meta"), mask)
        sent = simulation.to_server.read(2048 * function.dealt_bytes)
        assert abs(uniform_bytes([sent])) < 6.5
        # So is the difference of two neighbouring elements, whose entries are the same.
        rows = sent.reshape(2048, -1)
        assert abs(uniform_bytes([rows[1:] - rows[:-1]])) < 6.5


def test_shapes_alone_take_the_same_bytes() -> None:
    context = ShapeContext()
    mask = context.mask((5000,), torch.int32)
    assert SILU.pieces.evaluate(context, mask, mask).shape == mask.shape
    assert context.dealt == {"client": 0, "server": SILU.pieces.cost(5000).offline}


@pytest.mark.parametrize(
    ("windows", "step_bits", "widths"),
    [
        (3, 8, (4, 4)),
        (2, 8, (4, 4)),
        (8, 0, (4, 4)),
        (8, 30, (4, 4)),
        (8, 8, (3, 4)),
        (8, 8, (4, 9)),
        (8, 8, (4,)),
    ],
)
def test_a_table_that_kernels_do_not_take_raises(
    windows: int, step_bits: int, widths: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"windows|bytes"):
        Pieces(Polynomial(np.sin, 1), 0, windows, step_bits, widths, 4)
    with pytest.raises(ValueError, match="does not fit"):
        pieces = Pieces(Exponential(), 0, 4, 19, (6,), 12)
        pieces.curve.basis(pieces, torch.zeros(1, dtype=torch.int64))
