"""Who sees the bits that decide a rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Message, Protocol, Swap, ToClient, ToServer
from mergec.runtime.core.spec import CLIENT, SERVER
from mergec.runtime.core.values import Shared, decode
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops.elu import ELU
from mergec.runtime.ops.exp import EXP
from mergec.runtime.ops.gelu import GELU, GELU_TANH
from mergec.runtime.ops.mish import MISH
from mergec.runtime.ops.quick_gelu import QUICK_GELU
from mergec.runtime.ops.sigmoid import SIGMOID
from mergec.runtime.ops.silu import SILU
from mergec.runtime.ops.softmax import Softmax
from mergec.runtime.ops.tanh import TANH
from mergec.runtime.protocols.deferred import Deferred, deferred_norm
from mergec.runtime.protocols.interval import Table
from mergec.runtime.protocols.normalize import RowNorm, normalize
from mergec.runtime.protocols.opening import open_high
from mergec.runtime.protocols.power import Power, power
from mergec.runtime.protocols.rectify import rectify
from mergec.runtime.protocols.rows import _EXP
from mergec.runtime.protocols.saturate import Function, apply, function_input
from mergec.runtime.protocols.squares import truncated_square
from mergec.runtime.protocols.truncate import cut, truncate
from mergec.runtime.protocols.weights import share_weight

COUNT = 2**15
LIMIT = 6.0
"""Standard deviations. A thousand correlations with chance alone stay below."""


class Client(Simulation):
    """Keeps what the client sends and receives; of an opening to both, the sum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.view: list[torch.Tensor] = []

    def _deliver(self, client: Sequence[Message], server: Sequence[Message]) -> Any:
        for mine, theirs in zip(client, server, strict=True):
            if isinstance(mine, Swap):
                self.view += [mine.payload, mine.payload + theirs.payload]
            elif isinstance(mine, ToServer):
                self.view.append(mine.payload)
            elif isinstance(mine, ToClient):
                self.view.append(theirs.payload)
        return super()._deliver(client, server)


def _strongest(view: Sequence[torch.Tensor], error: torch.Tensor) -> float:
    """The largest correlation of the error with the low bits of a word, in standard deviations."""
    error = error / error.std()
    found = [0.0]
    for words in view:
        if words.numel() != error.numel():
            continue
        for bits in range(1, 8 * words.element_size()):
            low = (words.reshape(-1).long() & ((1 << bits) - 1)).double()
            if low.std() > 0:
                coin = (low - low.mean()) / low.std()
                found.append(float((coin * error).mean().abs()) * error.numel() ** 0.5)
    return max(found)


def _truncate(shift: int) -> Callable[[Context, Shared], Protocol]:
    return lambda ctx, x: truncate(ctx, x.share, shift)


def _scalar(function: Function) -> Callable[[Context, Shared], Protocol]:
    return lambda ctx, x: apply(ctx, function, function_input(ctx, x), 16)


def _softmax(size: int) -> Callable[[Context, Shared], Protocol]:
    def run(ctx: Context, x: Shared) -> Protocol:
        rows = Shared(x.share.reshape(-1, size), x.frac)
        result: Shared = yield from Softmax.protocol(ctx, rows)
        return result.share

    return run


def _deferred_norm(ctx: Context, x: Shared) -> Protocol:
    """Of rows of 4, times a matrix that keeps every place apart."""
    words = torch.eye(4).to(torch.int32) << 16
    held = words if ctx.party == SERVER else words.to("meta")
    weight = yield from share_weight(ctx, "w", held, 16)
    spec = Deferred(RowNorm(4, 40, 1e-5, 16.0), 14, 16, 6)
    return (yield from deferred_norm(ctx, x.share.reshape(-1, 4), weight, spec))


FUNCTIONS = {
    "silu": SILU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "quick_gelu": QUICK_GELU,
    "sigmoid": SIGMOID,
    "tanh": TANH,
    "elu": ELU,
    "mish": MISH,
    "exp": EXP,
}

VALUE = 1.2345678
ROW = (VALUE, -0.7, 0.2, 2.7654321)
ENDS = (-15.0, -15.2, 15.0, -7.9, 8.1, -14.6, -7.2, 8.6)
"""Where a table ends that is made for public rounding, and a tail begins."""
OCTAVES = (1.0000001, 1.9999, 2.03, 1.97, 7.9, 8.1, 0.51, 3.0)
"""In the middle of octaves and near their ends, where another one begins to count."""
LONG = (0.3, *[0.3 - 13.6] * 63)
"""Scores at the end of what an exponential made for public rounding tells from zero.

All are repeated, so that each place has one value and many roundings.
"""

CASES: dict[str, tuple[tuple[float, ...], int, Callable[[Context, Shared], Protocol]]] = {
    "truncate by 1": ((VALUE,), 30, _truncate(1)),
    "truncate by 16": ((VALUE,), 32, _truncate(16)),
    "truncate by 31": ((VALUE,), 47, _truncate(31)),
    "truncate by 40": ((VALUE,), 56, _truncate(40)),
    "square": ((VALUE,), 40, lambda ctx, x: truncated_square(ctx, x.share, 22)),
    "silu": ((VALUE,), 40, _scalar(SILU)),
    **{f"{name} at its ends": (ENDS, 40, _scalar(f)) for name, f in FUNCTIONS.items()},
    "relu": ((VALUE,), 40, lambda ctx, x: rectify(ctx, cut(ctx, x.share, 24))),
    "norm": (
        ROW,
        40,
        lambda ctx, x: normalize(ctx, x.share.reshape(-1, 4), RowNorm(4, 40, 1e-5, 16.0)),
    ),
    "deferred norm": (ROW, 40, _deferred_norm),
    "power": (OCTAVES, 40, lambda ctx, x: power(ctx, x.share, Power(-0.5, 40, 30, 44), 16)),
    "softmax": (ROW, 40, _softmax(4)),
    "softmax of a long row": (LONG, 40, _softmax(64)),
}


def _strength(name: str, exact: bool) -> float:
    row, frac, protocol = CASES[name]
    simulation = Client(exact=exact)
    values = torch.tensor(row, dtype=torch.float64).repeat(COUNT // len(row))
    shares = simulation.share(values, frac)
    results = simulation.run(lambda ctx, p: protocol(ctx, shares[p]))
    result = (results[0] + results[1]).reshape(-1, len(row)).double()
    error = (result - result.mean(0)).reshape(-1)
    return _strongest([shares[CLIENT].share, *simulation.view], error)


@pytest.mark.parametrize("name", CASES)
def test_the_client_sees_nothing_that_decides_an_exact_rounding(name: str) -> None:
    assert _strength(name, exact=True) < LIMIT


FAR = [name for name in CASES if name.partition(" ")[0] in ("truncate", "square", "silu", "relu")]


@pytest.mark.parametrize("name", FAR)
def test_public_roundings_depend_on_what_the_client_sees(name: str) -> None:
    """So the test above can fail."""
    assert _strength(name, exact=False) > 4 * LIMIT


@pytest.mark.parametrize("hidden", [1, 8, 15, 16, 17, 31, 32, 33, 47, 62])
def test_hidden_bits_do_not_reach_the_client(hidden: int) -> None:
    simulation = Client(exact=True)
    shares = simulation.share(torch.randn(1000, dtype=torch.float64), 16)

    def protocol(ctx: Context, x: Shared) -> Protocol:
        mask = ctx.mask(x.share.shape)
        opened = yield from open_high(ctx, x.share, mask, hidden)
        return opened, mask

    (mine, client_mask), (theirs, server_mask), _ = simulation.run(
        lambda ctx, p: protocol(ctx, shares[p])
    )
    assert torch.equal(mine, theirs)
    opened = shares[0].share + shares[1].share + client_mask + server_mask
    assert torch.equal(mine, opened >> hidden << hidden)
    received = simulation.view[1:]
    assert sum(part.element_size() for part in received) == (
        4 if hidden >= 32 else 6 if hidden >= 16 else 8
    )
    low = received[-1].long() & ((1 << min(hidden % 32 or 32, 8 * received[-1].element_size())) - 1)
    assert hidden >= 32 or not bool((received[-1].long() & ((1 << (hidden % 16)) - 1)).any()), low


@pytest.mark.parametrize("shift", range(1, 62))
def test_exact_rounding_is_up_or_down_and_right_on_average(shift: int) -> None:
    generator = torch.Generator().manual_seed(shift)
    x = torch.randint(-(2**61), 2**61, (4000,), generator=generator)
    simulation = Simulation(exact=True)
    shares = simulation.share(x, 0)
    results = simulation.run(lambda ctx, p: truncate(ctx, shares[p].share, shift))
    error = results[0] + results[1] - (x >> shift)
    assert set(error.unique().tolist()) <= {0, 1}
    fraction = (x & ((1 << shift) - 1)).double() * 2.0**-shift
    assert abs(float((error.double() - fraction).mean())) < 6 * 0.5 / len(x) ** 0.5


def _gap(table: Table) -> float:
    """How far the cubics of two adjacent windows are apart where either may serve an input."""
    size = 2 ** (table.step_bits - table.drop)
    place = np.arange(0, size, size // 64)[:, None]
    powers = np.stack([(place - start) ** k for start in (0, size) for k in range(4)])
    scaled = table.coefficients[: table.windows - 1] * 2.0**-table.out_frac
    here = np.einsum("wk,kp->wp", scaled[:-1], powers[:4, :, 0])
    there = np.einsum("wk,kp->wp", scaled[1:], powers[4:, :, 0])
    return float(np.abs(here - there).max())


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), _EXP])
def test_finer_tables_hardly_depend_on_the_window_that_serves(function: Function) -> None:
    """The bound that docs/protocols.md states; the row's exponentials reach 8."""
    assert function.fine is not None
    allowed = -19.9 if function is _EXP else -20.8
    assert _gap(function.fine.table) < 2.0**allowed < _gap(function.table)


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), _EXP])
def test_finer_tables_end_where_the_tail_is_the_function(function: Function) -> None:
    assert function.fine is not None
    table, fine = function.table, function.fine.table
    unit = 2.0**-16
    ends = [(f.start * unit, (f.start + (f.windows << f.step_bits)) * unit) for f in (table, fine)]
    if function.left:
        assert ends[1][0] <= ends[0][0] - 7
    if function.right:
        assert ends[1][1] >= ends[0][1] + 7
    for place, tail in ((ends[1][0] + 2.0, function.left), (ends[1][1] - 4.0, function.right)):
        if tail:
            simulation = Simulation(exact=True)
            shares = simulation.share(torch.full((64,), place, dtype=torch.float64), 16)
            results = simulation.run(lambda ctx, p, s=shares: _scalar(function)(ctx, s[p]))
            found = decode(results[0] + results[1], 16)
            assert (found - (tail.slope * place + tail.value)).abs().max() <= unit
