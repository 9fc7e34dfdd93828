"""For every op of the dialect: meaning, cost, scale and shape of its protocol, at once."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from mergec.runtime.core.cases import PUBLIC, Case
from mergec.runtime.core.messages import Message, Swap
from mergec.runtime.core.op import FINEST, FORMS, LAST, REGISTRY, Op
from mergec.runtime.core.spec import (
    HEADROOM_BITS,
    RANGE_MARGIN_BITS,
    SERVER,
    SHARE_FRAC,
    Cost,
    Vis,
)
from mergec.runtime.core.values import Held, Masked, Sent, Shared, Weight, Wide, encode
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from mergec.runtime.protocols.opening import open_masked
from mergec.runtime.protocols.shared_weights import open_constant, tell_constant_seed
from mergec.runtime.protocols.weights import send, share_weight
from tests.protocols.harness import uniform_bytes, wide_value

load_all()
FIXED = 16
CASES = [
    pytest.param(op, case, id=f"{name}-{i}")
    for name, op in REGISTRY.items()
    for i, case in enumerate(op.cases())
    if case.error is not None
]
"""Every call whose own protocol an op's file promises an error for."""

LIMIT = 6.5
"""Standard deviations; a uniform transcript exceeds them once in 10**8."""
ENOUGH = 2**13
"""Bytes that a statistic is made of."""

every_case = pytest.mark.parametrize(("op", "case"), CASES)


def test_every_op_has_a_case() -> None:
    assert {param.values[0].name for param in CASES} == set(REGISTRY)


@every_case
def test_protocol(op: type[Op], case: Case) -> None:
    """Result, shape, cost and scale are those that the op states."""
    assert case.error is not None
    simulation = Simulation(fixed=FIXED)
    views = arguments(simulation, op, case, case.args)
    simulation.cost = Cost()
    results = simulation.run(lambda ctx, p: op.protocol(ctx, *(view[p] for view in views)))
    expected = op.reference(*case.args)
    error = float((_value(simulation, results) - expected).abs().max())
    assert error < case.error, f"{op.name}: error {error:.3g}; the case allows {case.error:g}"
    assert all(tuple(result.shape) == tuple(expected.shape) for result in results)
    stated = op.cost(*(view[2] for view in views), fixed=FIXED)
    assert simulation.cost == stated, f"{op.name}: a run took the first; `cost` states the second"
    if op.local:
        assert simulation.cost == Cost()
    assert isinstance(results[0], RESULT_TYPES[op.result])
    if not isinstance(results[0], Held):
        seen = [_seen(view[0], arg) for view, arg in zip(views, case.args, strict=True)]
        assert results[0].frac == op.scale(*seen, fixed=FIXED)


@every_case
def test_protocol_with_exact_rounding(op: type[Op], case: Case) -> None:
    """The same result, but that powers are half as precise where two of their tables meet."""
    assert case.error is not None
    simulation = Simulation(fixed=FIXED, exact=True)
    views = arguments(simulation, op, case, case.args)
    simulation.cost = Cost()
    results = simulation.run(lambda ctx, p: op.protocol(ctx, *(view[p] for view in views)))
    error = float((_value(simulation, results) - op.reference(*case.args)).abs().max())
    allowed = 2 * case.error
    assert error < allowed, f"{op.name}: error {error:.3g}; the case allows {allowed:g}"


def _open_forms(op: type[Op], case: Case) -> dict[str, int]:
    """The shared operands of a case whose number of fractional bits is open: at most how many."""
    wanted = {**op.forms(*case.args), **dict.fromkeys(case.forms, "")}
    tensors = dict(zip(op.tensors, case.args, strict=False))
    return {
        name: FINEST[wanted[name]]
        for name, value in tensors.items()
        if wanted.get(name) in FINEST and isinstance(value, torch.Tensor)
    }


EVERY_FRAC = [
    pytest.param(op, case, id=param.id, marks=[] if param.id.endswith("-0") else pytest.mark.slow)
    for param in CASES
    for op, case in [param.values]
    if _open_forms(op, case)
]


@pytest.mark.parametrize(("op", "case"), EVERY_FRAC)
def test_protocol_at_every_number_of_fractional_bits(op: type[Op], case: Case) -> None:
    """From the program's own up to the most that the form admits, as far as the inputs fit."""
    finest = _open_forms(op, case)
    largest = max(float(value.abs().max()) for value in case.args if _is_real(value))
    inner = op.inner_bits(case.args[0].shape) + math.log2(max(largest, 1.0)) + RANGE_MARGIN_BITS
    checked = []
    for frac in range(FIXED, min(*finest.values(), SHARE_FRAC, int(HEADROOM_BITS - inner)) + 1):
        simulation = Simulation(fixed=FIXED)
        views = arguments(simulation, op, case, case.args, dict.fromkeys(finest, frac))
        results = simulation.run(lambda ctx, p, v=views: op.protocol(ctx, *(x[p] for x in v)))
        if isinstance(results[0], Shared) and results[0].frac + inner > HEADROOM_BITS:
            # A local op adds bits of its own; the compiler truncates its operand in this case.
            assert op.local
            break
        error = float((_value(simulation, results) - op.reference(*case.args)).abs().max())
        assert error < case.error, f"{op.name} at {frac} fractional bits: error {error:.3g}"
        checked.append(frac)
    assert checked


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


RESULT_TYPES = {
    "share": (Shared, Wide),
    "masked": Masked,
    "sent": Sent,
    "cache": (Masked, Sent),
    "revealed": Held,
}


@every_case
def test_the_forms_are_known(op: type[Op], case: Case) -> None:
    known = [Vis.SHARED if isinstance(arg, torch.Tensor) else arg for arg in case.args]
    forms = op.forms(*known)
    assert set(forms) <= set(op.tensors)
    assert set(forms.values()) <= set(FORMS)


@pytest.mark.parametrize("op", REGISTRY.values(), ids=REGISTRY)
def test_an_op_without_messages_is_local(op: type[Op]) -> None:
    """An op that costs nothing in every case is local, and the other way round."""
    free = []
    for case in op.cases():
        if case.error is None:
            continue
        simulation = Simulation(fixed=FIXED)
        values = [view[2] for view in arguments(simulation, op, case, case.args)]
        for value in values:
            # Finer than the program, so that a truncation has something to do.
            if isinstance(value, Shared) and "share" in op.operands.values():
                value.frac = 2 * FIXED
        free.append(op.cost(*values, fixed=FIXED) == Cost())
    assert op.local == all(free)


def _stated() -> dict[str, tuple[int, ...]]:
    """Rounds, online and offline bytes per element, of each op whose docstring states them."""
    pattern = r"Rounds (\d+); per element (\d+) bytes\s+online, (\d+) offline"
    found = {name: re.search(pattern, op.__doc__ or "") for name, op in REGISTRY.items()}
    return {name: tuple(map(int, m.groups())) for name, m in found.items() if m is not None}


@pytest.mark.parametrize("name", _stated())
def test_the_docstring_states_the_cost(name: str) -> None:
    rounds, online, offline = _stated()[name]
    op = REGISTRY[name]
    shape = (7, 3)
    words = torch.empty(shape, dtype=torch.int64, device="meta")
    values = [Shared(words, FIXED if op.operands["x"] == "fixed" else 2 * FIXED)]
    assert op.cost(*values, fixed=FIXED) == Cost(rounds, 21 * online, 21 * offline)


def test_the_docstrings_of_scalar_functions_state_their_cost() -> None:
    assert {"silu", "gelu", "exp", "log", "reciprocal", "rsqrt", "relu", "open", "send"} <= set(
        _stated()
    )


@pytest.mark.parametrize("op", REGISTRY.values(), ids=REGISTRY)
def test_the_last_position_alone(op: type[Op]) -> None:
    """The call that `last_position` describes computes the last position of the whole result."""
    for case in op.cases():
        names = list(inspect.signature(op.reference).parameters)[: len(case.args)]
        whole = op.reference(*case.args)
        for dim in range(-whole.dim(), 0):
            rule = op.last_position(dim)
            if rule is None:
                continue
            few = [
                _last(arg, dim, whole) if rule.get(name) is LAST else rule.get(name, arg)
                for name, arg in zip(names, case.args, strict=True)
            ]
            torch.testing.assert_close(op.reference(*few), _last(whole, dim, whole))


def _last(value: Any, dim: int, whole: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() < -dim or value.shape[dim] == 1:
        return value
    assert value.shape[dim] == whole.shape[dim]
    return value.narrow(dim, value.shape[dim] - 1, 1)


@every_case
def test_messages_are_uniform_and_of_one_shape(op: type[Op], case: Case) -> None:
    """For fixed inputs: what each party receives, and what both open. Zeros look the same."""
    shapes = []
    for inputs in (case.args, [_zero(arg) for arg in case.args]):
        wire = Wire(fixed=FIXED, record=True)
        while sum(payload.nbytes for payload in wire.transcript) < ENOUGH:
            _play(wire, op, case, inputs)
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


def _play(wire: Wire, op: type[Op], case: Case, args: Sequence[Any]) -> None:
    """Run the op once, on fresh shares; only its own messages are kept."""
    # Every run is a session of its own, with static masks of its own.
    simulation = Wire(fixed=FIXED)
    views = arguments(simulation, op, case, args)
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
        if op.result != "revealed":
            assert op.visibility(Vis.CLIENT, Vis.SERVER) is Vis.SHARED
            assert op.visibility(Vis.SHARED) is Vis.SHARED


def test_reference_gives_shapes_on_fake_tensors() -> None:
    for param in CASES:
        op, case = param.values
        meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in case.args]
        assert op.reference(*meta).shape == op.reference(*case.args).shape


def arguments(
    simulation: Simulation,
    op: type[Op],
    case: Case,
    args: Sequence[Any],
    fracs: Mapping[str, int] | None = None,
) -> list[list[Any]]:
    """What each role gets for each argument. fracs: fractional bits other than the program's."""
    wanted = {**op.forms(*args), **case.forms}
    parameters = inspect.signature(op.reference).parameters
    return [
        _views(simulation, wanted.get(parameter), parameter, arg, (fracs or {}).get(parameter))
        for parameter, arg in zip(parameters, args, strict=False)
    ]


def _views(
    simulation: Simulation, form: str | None, name: str, arg: Any, frac: int | None = None
) -> list[Any]:
    """What each role gets for an argument."""
    if not isinstance(arg, torch.Tensor) or form == PUBLIC:
        return [arg] * 3
    if form == "shared":
        simulation.run(lambda ctx, p: tell_constant_seed(ctx))
        words = encode(arg, FIXED)
        return simulation.run(
            lambda ctx, p: open_constant(
                ctx, name, words if p == SERVER else words.to("meta"), FIXED
            )
        )
    if not arg.is_floating_point():
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
    shares = simulation.share(arg, frac)
    if form in ("masked", "cache"):
        return simulation.run(lambda ctx, p: open_masked(ctx, shares[p]))
    if form == "sent":
        return simulation.run(lambda ctx, p: send(ctx, shares[p]))
    return shares


def _value(simulation: Simulation, results: list[Any]) -> torch.Tensor:
    client, server, dealer = results
    if isinstance(client, Shared):
        return simulation.reveal(results)
    if isinstance(client, Wide):
        return wide_value(client, server) * 2.0**-client.frac
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
