"""For every op of the dialect: meaning, cost, scale and shape of its protocol, at once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mergec.runtime.core.messages import Message, Swap
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import SERVER, Cost, Vis
from mergec.runtime.core.values import Held, Masked, Sent, Shared, Weight, encode
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from mergec.runtime.protocols.opening import open_masked
from mergec.runtime.protocols.shared_weights import open_constant, tell_constant_seed
from mergec.runtime.protocols.weights import send, share_weight
from tests.protocols.harness import uniform_bytes

load_all()
FIXED = 16
GENERATOR = torch.Generator().manual_seed(7)


def real(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR) * scale


def spread(limit: float) -> torch.Tensor:
    """The whole range of a scalar function, its edges, and far beyond its table."""
    far = torch.tensor([-16_000.0, -64.0, 64.0, 16_000.0, 0.0, 2.0**-16, -(2.0**-16)])
    return torch.cat([torch.linspace(-limit, limit, 3001, dtype=torch.float64), far.double()])


ANGLES = real(3, 8)
MASK = torch.full((1, 1, 4, 9), torch.finfo(torch.float32).min).triu(6)
ALIBI = MASK + real(1, 6, 1, 9).float()
# All octaves of a positive number that 16 fractional bits can tell from zero.
POSITIVE = torch.cat([torch.arange(1, 40), torch.exp2(torch.linspace(6, 44.9, 400).double())])
POSITIVE = POSITIVE.round() * 2.0**-16
PUBLIC = "public"
"""Marks a tensor operand that all parties know."""

SHARED = "shared"
"""Marks a constant that is shared, and opened under its static mask."""

TABLES = {"cos": PUBLIC, "sin": PUBLIC}

# op, arguments, forms of operands where they are not the op's own, largest error. A fixed-point
# operand is rounded to 2**-17; products of unit size and sums of 8 to 64 of them keep that to 1e-4.
CASES: list[tuple[str, list[Any], dict[str, str], float]] = [
    ("add", [real(3, 4), real(4)], {}, 3e-5),
    ("add", [real(3, 4), real(4)], {"b": PUBLIC}, 3e-5),
    ("sub", [real(3, 4), real(3, 4)], {}, 3e-5),
    ("scale", [real(3, 4), 0.125], {}, 1e-5),
    ("scale", [real(3, 4), -4.0], {}, 1e-4),
    ("scale", [real(3, 4), -0.3], {}, 3e-5),
    ("shift", [real(3, 4), 1.5], {}, 2e-5),
    ("sum", [real(3, 8)], {}, 1e-4),
    ("mul", [real(3, 4), real(4)], {"b": "weight"}, 1e-4),
    ("mul", [real(3, 4), real(3, 1)], {}, 1e-4),
    ("mul", [real(3, 4), real(4)], {"b": PUBLIC}, 1e-4),
    ("square", [real(3, 4)], {}, 1e-4),
    ("quadratic", [real(3, 4), 0.125, 0.25, 0.5], {}, 1e-4),
    ("quadratic", [real(3, 4), -0.3, 0.0, 1.7], {}, 1e-4),
    ("linear", [real(2, 3, 8), real(5, 8), real(5)], {"weight": "weight", "bias": "held"}, 2e-4),
    ("linear", [real(1, 8), real(5, 8), None], {"weight": "weight"}, 2e-4),
    ("part", [real(2, 7), 2, 5, 0], {}, 1e-5),
    ("embedding", [torch.tensor([[3, 0, 6]]), real(7, 4)], {"weight": "weight"}, 1e-5),
    ("embedding", [torch.tensor([[3, 0, 6]]), real(7, 4)], {"weight": SHARED}, 1e-5),
    ("embedding", [torch.tensor([[3, 0, 6]]), real(7, 4)], {"ids": PUBLIC, "weight": SHARED}, 1e-5),
    (
        "linear",
        [real(2, 3, 8), real(5, 8), real(5)],
        {"x": "masked", "weight": SHARED, "bias": "share"},
        2e-4,
    ),
    ("mul", [real(8), real(3, 8)], {"a": SHARED}, 1e-4),
    ("rms_norm", [real(3, 64), real(64), 1e-5, 1.0], {"weight": SHARED}, 2e-4),
    (
        "layer_norm",
        [real(3, 48) + 2, real(48), real(48), 1e-5],
        {"weight": SHARED, "bias": "share"},
        2e-4,
    ),
    ("matmul", [real(2, 3, 8), real(2, 8, 4)], {}, 2e-4),
    ("silu", [spread(20)], {}, 5e-5),
    ("gelu", [spread(10)], {}, 5e-5),
    ("gelu", [spread(10), True], {}, 5e-5),
    ("quick_gelu", [spread(10)], {}, 5e-5),
    ("tanh", [spread(10)], {}, 5e-5),
    ("sigmoid", [spread(20)], {}, 5e-5),
    ("relu", [spread(20)], {}, 1e-5),
    ("exp", [-spread(20).abs()], {}, 5e-5),
    ("reciprocal", [spread(3)[3001:].abs().clamp(0.1, 100)], {}, 1e-3),
    ("log", [POSITIVE], {}, 3e-5),
    ("rsqrt", [spread(3).abs() + 0.1], {}, 1e-3),
    ("glu", [real(3, 8, scale=3), real(3, 8), "silu"], {}, 2e-4),
    ("glu", [real(3, 8, scale=3), real(3, 8), "gelu"], {}, 2e-4),
    ("glu", [real(3, 8, scale=3), real(3, 8), "gelu_tanh"], {}, 2e-4),
    ("glu", [real(3, 8, scale=3), real(3, 8), "relu"], {}, 2e-4),
    ("rms_norm", [real(3, 64), real(64), 1e-5], {"weight": "weight"}, 2e-4),
    ("rms_norm", [real(3, 64), real(64), 1e-5, 1.0], {"weight": "weight"}, 2e-4),
    ("rms_norm", [real(3, 64), None, 1e-5], {}, 2e-4),
    (
        "layer_norm",
        [real(3, 48) + 2, real(48), real(48), 1e-5],
        {"weight": "weight", "bias": "held"},
        2e-4,
    ),
    ("layer_norm", [real(3, 48) + 2, None, None, 1e-5], {}, 2e-4),
    ("softmax", [real(5, 37, scale=8)], {}, 1e-4),
    ("softmax", [torch.tensor([[1e4, -1e4, 1e4 - 1.0]], dtype=torch.float64)], {}, 1e-4),
    ("rotary", [real(1, 2, 3, 8), ANGLES.cos(), ANGLES.sin()], TABLES, 1e-4),
    ("rotary", [real(1, 2, 3, 16), ANGLES.cos(), ANGLES.sin(), True], TABLES, 1e-4),
    *(
        (
            "attention",
            [real(1, 6, 4, 16, scale=3), real(1, g, 9, 16), real(1, g, 9, 16), m, 0.25, c],
            {"mask": PUBLIC},
            3e-4,
        )
        for g, m, c in ((2, MASK, 0.0), (6, ALIBI, 0.0), (1, None, 0.0), (2, MASK, 20.0))
    ),
    *(
        (
            "ratio_attention",
            [real(1, 6, 4, 16, scale=3), real(1, g, 9, 16), real(1, g, 9, 16), m, 0.25, c, kind],
            {"mask": PUBLIC},
            1e-3,
        )
        for kind in ("2quad", "2relu")
        for g, m, c in ((2, MASK, 0.0), (6, ALIBI, 0.0), (1, None, 0.0), (2, MASK, 20.0))
    ),
    *(
        ("constant_attention", [real(1, 2, n, 8), real(6, 5, 5).abs(), 3], forms, 5e-4)
        for n in (3, 5, 9)
        for forms in ({"weight": "weight"}, {"values": "masked", "weight": SHARED})
    ),
    ("cache_append", [real(1, 2, 3, 4), real(1, 2, 1, 4)], {}, 1e-5),
    ("carry", [real(3, 4)], {}, 1e-5),
    ("truncate", [real(3, 4)], {}, 3e-5),
    ("open", [real(3, 4)], {}, 1e-5),
    ("send", [real(3, 4)], {}, 1e-5),
    ("reveal", [real(3, 4)], {}, 1e-5),
    ("reveal_token", [real(3, 40)], {}, 0.5),
]


LIMIT = 6.5
"""Standard deviations; a uniform transcript exceeds them once in 10**8."""
ENOUGH = 2**13
"""Bytes that a statistic is made of."""

every_case = pytest.mark.parametrize(
    ("name", "args", "forms", "tolerance"),
    CASES,
    ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)],
)


def test_every_op_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(REGISTRY)


@every_case
def test_protocol(name: str, args: list[Any], forms: dict[str, str], tolerance: float) -> None:
    op = REGISTRY[name]
    simulation = Simulation(fixed=FIXED)
    parameters = list(inspect.signature(op.reference).parameters)
    wanted = {**op.forms(*args), **forms}
    views = [
        _views(simulation, wanted.get(parameter), parameter, arg)
        for parameter, arg in zip(parameters, args, strict=False)
    ]
    simulation.cost = Cost()
    results = simulation.run(lambda ctx, p: op.protocol(ctx, *(view[p] for view in views)))
    expected = op.reference(*args)
    assert (_value(simulation, results) - expected).abs().max() < tolerance
    assert all(tuple(result.shape) == tuple(expected.shape) for result in results)
    assert simulation.cost == op.cost(*(view[2] for view in views), fixed=FIXED)
    if isinstance(results[0], (Shared, Masked, Sent)):
        seen = [_seen(view[0], arg) for view, arg in zip(views, args, strict=True)]
        assert results[0].frac == op.scale(*seen, fixed=FIXED)


@every_case
def test_messages_are_uniform_and_of_one_shape(
    name: str, args: list[Any], forms: dict[str, str], tolerance: float
) -> None:
    """For fixed inputs: what each party receives, and what both open. Zeros look the same."""
    shapes = []
    for inputs in (args, [_zero(arg) for arg in args]):
        wire = Wire(fixed=FIXED, record=True)
        while sum(payload.nbytes for payload in wire.transcript) < ENOUGH:
            _play(wire, name, inputs, forms)
            if not wire.transcript:
                break
        for payloads in (wire.transcript, wire.sums, wire.differences):
            assert not payloads or abs(uniform_bytes(payloads)) < LIMIT
        shapes.append([(payload.dtype, payload.shape) for payload in wire.transcript])
    assert shapes[0] == shapes[1]


class Wire(Simulation):
    """Keeps besides what the two messages of an opening add up to, and for bits their XOR."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sums: list[torch.Tensor] = []
        self.differences: list[torch.Tensor] = []

    def _deliver(self, client: Sequence[Message], server: Sequence[Message]) -> Any:
        for mine, theirs in zip(client, server, strict=True):
            if isinstance(mine, Swap):
                self.sums.append(mine.payload + theirs.payload)
                self.differences.append(mine.payload ^ theirs.payload)
        return super()._deliver(client, server)


def _play(wire: Wire, name: str, args: list[Any], forms: dict[str, str]) -> None:
    """Run the op once, on fresh shares; only its own messages are kept."""
    op = REGISTRY[name]
    wanted = {**op.forms(*args), **forms}
    # Every run is a session of its own, with static masks of its own.
    simulation = Wire(fixed=FIXED)
    views = [
        _views(simulation, wanted.get(parameter), parameter, arg)
        for parameter, arg in zip(inspect.signature(op.reference).parameters, args, strict=False)
    ]
    simulation.record = True
    simulation.sums, simulation.differences = wire.sums, wire.differences
    simulation.transcript = wire.transcript
    simulation.run(lambda ctx, p: op.protocol(ctx, *(view[p] for view in views)))


def _zero(arg: Any) -> Any:
    """Another input of the same shape; one that is positive where an op needs that."""
    if not isinstance(arg, torch.Tensor) or arg.dtype is torch.float32:
        return arg
    return torch.ones_like(arg) if bool((arg > 0).all()) else torch.zeros_like(arg)


def test_the_result_of_a_secret_is_never_public() -> None:
    for op in REGISTRY.values():
        for vis in (Vis.CLIENT, Vis.SERVER, Vis.SHARED):
            assert op.visibility(vis, Vis.PUBLIC) is not Vis.PUBLIC
        if not op.name.startswith("reveal"):
            assert op.visibility(Vis.CLIENT, Vis.SERVER) is Vis.SHARED
            assert op.visibility(Vis.SHARED) is Vis.SHARED


def test_reference_gives_shapes_on_fake_tensors() -> None:
    for name, args, _, _ in CASES:
        op = REGISTRY[name]
        meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
        assert op.reference(*meta).shape == op.reference(*args).shape


def _views(simulation: Simulation, form: str | None, name: str, arg: Any) -> list[Any]:
    """What each role gets for an argument."""
    if not isinstance(arg, torch.Tensor) or form == PUBLIC:
        return [arg] * 3
    if form == SHARED:
        simulation.run(lambda ctx, p: tell_constant_seed(ctx))
        words = encode(arg, FIXED)
        return simulation.run(
            lambda ctx, p: open_constant(
                ctx, name, words if p == SERVER else words.to("meta"), FIXED
            )
        )
    if name == "ids":
        return [Held(Vis.CLIENT, arg if p == 0 else arg.to("meta")) for p in range(3)]
    if form == "held":
        return [Held(Vis.SERVER, arg if p == SERVER else arg.to("meta")) for p in range(3)]
    if form == "weight":
        words = encode(arg, FIXED).to(torch.int32)
        return simulation.run(
            lambda ctx, p: share_weight(
                ctx, name, words if p == SERVER else words.to("meta"), FIXED
            )
        )
    shares = simulation.share(arg)
    if form == "masked":
        return simulation.run(lambda ctx, p: open_masked(ctx, shares[p]))
    if form == "sent":
        return simulation.run(lambda ctx, p: send(ctx, shares[p]))
    return shares


def _value(simulation: Simulation, results: list[Any]) -> torch.Tensor:
    client, server, dealer = results
    if isinstance(client, Shared):
        return simulation.reveal(results)
    if isinstance(client, Held):
        assert server.value.is_meta
        assert dealer.value.is_meta
        return client.value
    opened = (
        client.opened - dealer.mask if isinstance(client, Masked) else server.opened + dealer.mask
    )
    return opened.double() * 2.0**-client.frac


def _seen(value: Any, arg: Any) -> Any:
    if isinstance(value, (Shared, Masked, Sent)):
        return value.frac
    if isinstance(value, (Held, Weight)):
        return Vis.SERVER
    return Vis.PUBLIC if isinstance(arg, torch.Tensor) else arg
