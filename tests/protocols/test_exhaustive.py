"""Every input of a small domain, for each protocol; `test_formula` covers bits and digits."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import FRACTIONAL_BITS, SERVER
from mergec.runtime.core.values import Shared
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from mergec.runtime.protocols.argmax import Candidates, best
from mergec.runtime.protocols.multiply import multiply
from mergec.runtime.protocols.normalize import SCALED_FRAC, RowNorm, normalize
from mergec.runtime.protocols.power import Power, power
from mergec.runtime.protocols.rectify import rectify
from mergec.runtime.protocols.squares import truncated_square
from mergec.runtime.protocols.truncate import cut, truncate
from mergec.runtime.protocols.weights import linear, send, share_weight
from tests.protocols.harness import integers, run

load_all()
BYTE = torch.arange(-128, 128)
SMALL = torch.arange(-4096, 4096)
FEW = (-2, -1, 0, 1)


def _run(values: torch.Tensor, protocol) -> torch.Tensor:
    simulation = Simulation()
    shares = integers(simulation, values)
    result, _ = run(simulation, lambda ctx, p: protocol(ctx, shares[p].share))
    return result


@pytest.mark.parametrize("shift", [1, 4, 12, 16, 31, 32, 33, 48, 62])
def test_truncation_of_every_small_number(shift: int) -> None:
    error = _run(SMALL, lambda ctx, x: truncate(ctx, x, shift)) - (SMALL >> shift)
    assert set(error.tolist()) <= ({0, 1} if shift <= 32 else {-1, 0, 1, 2})


def test_products_of_all_pairs_of_bytes() -> None:
    x, y = BYTE[:, None].expand(256, 256), BYTE[None, :].expand(256, 256)
    simulation = Simulation()
    one, other = integers(simulation, x), integers(simulation, y)

    def protocol(ctx, p):
        (product,) = yield from multiply(ctx, (one[p].share, other[p].share))
        return product

    result, _ = run(simulation, protocol)
    assert torch.equal(result, x * y)


def test_a_held_weight_times_all_bytes() -> None:
    simulation = Simulation()
    shares = integers(simulation, BYTE[:, None])
    words = BYTE[:, None].to(torch.int32)

    def protocol(ctx, p):
        weight = yield from share_weight(ctx, "w", words if p == SERVER else words.to("meta"), 0)
        sent = yield from send(ctx, shares[p])
        return linear(ctx, sent, weight)

    result, _ = run(simulation, protocol)
    assert torch.equal(result, BYTE[:, None] * BYTE[None, :])


def test_rectification_and_squares_of_every_small_number() -> None:
    assert torch.equal(_run(SMALL, lambda ctx, x: rectify(ctx, cut(ctx, x, 0))), SMALL.clamp(min=0))
    assert torch.equal(_run(SMALL, lambda ctx, x: truncated_square(ctx, x, 0)), SMALL**2)
    square = _run(SMALL, lambda ctx, x: truncated_square(ctx, x, 5))
    low = SMALL >> 5
    assert bool(((square == low**2) | (square == (low + 1) ** 2)).all())


def test_maxima_and_places_of_every_row_of_four() -> None:
    rows = torch.tensor(list(itertools.product(FEW, repeat=4)))
    simulation = Simulation()
    shares = [s.share.to(torch.int32) for s in integers(simulation, rows)]
    client, server, _ = simulation.run(lambda ctx, p: best(ctx, Candidates(shares[p]), 3, (4,)))
    ordered = rows.sort(dim=1, descending=True, stable=True)
    assert torch.equal((client.keys + server.keys).long(), ordered.values[:, :3])
    assert torch.equal((client.labels + server.labels).long(), ordered.indices[:, :3])


@pytest.mark.parametrize("exponent", [-1.0, -0.5])
def test_powers_of_every_small_number(exponent: float) -> None:
    spec, frac = Power(exponent, 0, 0, 12), 40
    values = torch.arange(1, 2**13)
    result = _run(values, lambda ctx, x: power(ctx, x, spec, frac)).double() * 2.0**-frac
    exact = values.double() ** exponent
    assert ((result / exact - 1).abs() < 2**-16).all()


def test_norms_of_every_small_row_of_two() -> None:
    rows = torch.cartesian_prod(BYTE[96:160], BYTE[96:160])
    spec = RowNorm(2, 6, 2.0**-8, 2.0**2)
    result = _run(rows, lambda ctx, x: normalize(ctx, x, spec)).double() * 2.0**-SCALED_FRAC
    real = rows.double() * 2.0**-6
    exact = real * torch.rsqrt(real.square().mean(1, keepdim=True) + spec.eps)
    assert (result - exact).abs().max() < 2**-15 + 2**-13


@pytest.mark.parametrize(
    "name", ["silu", "gelu", "quick_gelu", "tanh", "sigmoid", "exp", "relu", "elu", "mish"]
)
def test_functions_at_every_input_around_zero(name: str) -> None:
    """A quarter of the inputs on either side of zero, one by one, and those at the table's ends."""
    op = REGISTRY[name]
    places = [0] if name == "exp" else [0, -(16 << 16), 16 << 16, -(8 << 16), 8 << 16]
    near = torch.arange(-(2**11), 2**11)
    values = torch.cat([place + near for place in places])
    simulation = Simulation()
    shares = [Shared(s.share, FRACTIONAL_BITS) for s in integers(simulation, values)]
    results = simulation.run(lambda ctx, p: op.protocol(ctx, shares[p]))
    error = simulation.reveal(results) - op.reference(values.double() * 2.0**-FRACTIONAL_BITS)
    assert error.abs().max() < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["silu", "gelu", "quick_gelu", "tanh", "sigmoid", "elu", "mish"])
def test_functions_at_every_input_of_the_table(name: str) -> None:
    """All 16-bit fractions from -20 to 20: 2.6 million inputs."""
    op = REGISTRY[name]
    for start in range(-20 << 16, 20 << 16, 1 << 15):
        values = torch.arange(start, start + (1 << 15))
        simulation = Simulation()
        shares = [Shared(s.share, FRACTIONAL_BITS) for s in integers(simulation, values)]
        results = simulation.run(lambda ctx, p, s=shares: op.protocol(ctx, s[p]))
        error = simulation.reveal(results) - op.reference(values.double() * 2.0**-FRACTIONAL_BITS)
        assert error.abs().max() < 5e-5
