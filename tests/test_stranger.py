"""A bundle from a stranger makes no party do anything whose size or failure tells a secret."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.runtime.core.context import ClientContext, ServerContext
from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.spec import ROLES, Vis
from mergec.runtime.core.structural import SECRET_MOVES, SIZE, TABLE, _overload, secret_parameters
from mergec.runtime.core.values import Held
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.engine.executor import Executor
from mergec.runtime.engine.plan import Planned
from mergec.runtime.engine.rehearsal import Rehearsal, _call
from mergec.runtime.engine.simulate import Corrections, Simulation
from mergec.runtime.program.bundle import save_bundle
from mergec.runtime.program.program import (
    PADS,
    InputSpec,
    Instruction,
    Phase,
    Ref,
    RoleProgram,
)
from mergec.runtime.program.validate import validate
from mergec.runtime.protocols.weights import share_weight, table_rows
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.session.generation import answer
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.transport.loopback import link_pair
from tests import decoder
from tests.decoder import VOCAB

IDS, EMBED, TABLE_NAME = Ref("ids"), Ref("embed"), Ref("embed.weight")


def with_more(program: RoleProgram, *items: tuple[Any, ...]) -> RoleProgram:
    """The program with more instructions behind `embed`: (name, target, vis, *args[, kwargs])."""
    more = []
    for name, target, vis, *args in items:
        kwargs = args.pop() if isinstance(args[-1], dict) else {}
        frac = 16 if vis is Vis.SHARED else 0
        more.append(Instruction(name, target, tuple(args), kwargs, vis, frac))
    place = next(i for i, item in enumerate(program.instructions) if item.name == "embed") + 1
    program.instructions[place:place] = more
    return program


def used(program: RoleProgram) -> RoleProgram:
    """The program with `x` as a further cache, so that each step computes it."""
    program.inputs.append(InputSpec("cache.x", Vis.SHARED, "float32", (1, "past"), 16, "x"))
    program.outputs.append("x")
    return program


CLIENT, SERVER, SHARED, PUBLIC = Vis.CLIENT, Vis.SERVER, Vis.SHARED, Vis.PUBLIC
FEW = ("few", "aten.ge.Scalar", CLIENT, IDS, 5)
TOKEN = ("token", "aten.select.int", CLIENT, IDS, 1, 0)
LARGE = ("large", "aten.ge.Scalar", SERVER, TABLE_NAME, 0.0)

REFUSED: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "boolean index": (
        [FEW, ("x", "aten.index.Tensor", CLIENT, IDS, [Ref("few")])],
        "depends on the value of 'few', which is known to the client alone",
    ),
    "boolean index of a share": (
        [FEW, ("x", "aten.index.Tensor", SHARED, EMBED, [Ref("few")])],
        "depends on the value of 'few'",
    ),
    "look-up out of range": (
        [("x", "aten.index_select.default", CLIENT, IDS, 1, IDS)],
        "depends on the value of 'ids'",
    ),
    "gather": ([("x", "aten.gather.default", CLIENT, IDS, 1, IDS)], "depends on the value"),
    "embedding": (
        [("x", "aten.embedding.default", SHARED, TABLE_NAME, IDS)],
        "depends on the value of 'ids'",
    ),
    "embedding in a public table": (
        [("x", "mpc.embedding", CLIENT, IDS, Ref("zero"))],
        "depends on the value of 'ids'",
    ),
    "repeated by a token": (
        [TOKEN, ("x", "aten.repeat.default", CLIENT, IDS, [1, Ref("token")])],
        "depends on the value of 'token'",
    ),
    "cut at a token": (
        [TOKEN, ("x", "aten.slice.Tensor", SHARED, EMBED, 1, 0, Ref("token"))],
        "depends on the value of 'token'",
    ),
    "as long as a token": (
        [TOKEN, ("x", "aten.arange.default", PUBLIC, Ref("token"))],
        "depends on the value of 'token'",
    ),
    "filled with a token": (
        [TOKEN, ("x", "aten.full.default", PUBLIC, [2], Ref("token"))],
        "depends on the value of 'token'",
    ),
    "one of a list": (
        [
            TOKEN,
            ("parts", "aten.split.Tensor", SHARED, EMBED, 1, 2),
            ("x", "sym.getitem", SHARED, Ref("parts"), Ref("token")),
        ],
        "depends on the value of 'token'",
    ),
    "by another name": (
        [TOKEN, ("x", "aten.view.default", CLIENT, IDS, {"shape": [1, Ref("token")]})],
        "depends on the value of 'token'",
    ),
    "one argument too many": (
        [("x", "mpc.square", SHARED, EMBED, IDS)],
        "does not fit the op's schema '(Tensor x) -> Tensor' (too many positional arguments)",
    ),
    "one literal too many": (
        [("x", "mpc.square", SHARED, EMBED, 7)],
        "does not fit the op's schema '(Tensor x) -> Tensor' (too many positional arguments)",
    ),
    "a parameter that does not exist": (
        [("x", "mpc.square", SHARED, EMBED, {"y": 7})],
        "(got an unexpected keyword argument 'y')",
    ),
    "a parameter twice": (
        [("x", "mpc.square", SHARED, EMBED, {"x": EMBED})],
        "(multiple values for argument 'x')",
    ),
    "one argument too few": (
        [("x", "mpc.mul", SHARED, EMBED)],
        "(missing a required argument: ",
    ),
    "arithmetic of lengths": (
        [TOKEN, ("x", "sym.max", CLIENT, Ref("token"), 3)],
        "depends on the value of 'token'",
    ),
    "division by a token": (
        [("x", "aten.floor_divide.default", CLIENT, IDS, IDS)],
        "depends on the value of 'ids'",
    ),
    "a secret number of an op": (
        [TOKEN, ("x", "mpc.shift", SHARED, EMBED, Ref("token"))],
        "depends on the value of 'token'",
    ),
    "sign of a share": (
        [("x", "aten.ge.Scalar", SHARED, EMBED, 0)],
        "computes with single shares of 'embed'",
    ),
    "weights, too": (
        [LARGE, ("x", "aten.index.Tensor", SERVER, TABLE_NAME, [Ref("large")])],
        "depends on the value of 'large', which is known to the server alone",
    ),
    "a share as a token": (
        [("x", "mpc.embedding", SHARED, EMBED, TABLE_NAME)],
        "needs 'embed' in the clear, but it is shared",
    ),
    "declared as public": (
        [("x", "aten.add.Scalar", PUBLIC, IDS, 1)],
        "makes a secret public",
    ),
    "declared as the server's": (
        [("x", "aten.add.Scalar", SERVER, IDS, 1)],
        "is declared as server, but is client",
    ),
    "revealed by declaration": (
        [("x", "mpc.add", CLIENT, EMBED, EMBED)],
        "is declared as client, but is shared",
    ),
}
"""Instructions that are refused when a bundle is read, and why."""


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("role", ROLES)
def test_what_depends_on_values_is_refused(tmp_path: Path, kind: str, role: str) -> None:
    items, words = REFUSED[kind]
    program = with_more(decoder.program(role), *items)
    with pytest.raises(BundleError) as caught:
        save_bundle(program, tmp_path / role)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert "do not use it" in message
    assert not list(tmp_path.iterdir())


ALLOWED: dict[str, list[tuple[Any, ...]]] = {
    "arithmetic on tokens": [("x", "aten.add.Scalar", CLIENT, IDS, 1)],
    "a token alone": [TOKEN],
    "public entries of a share": [
        ("pick", "aten.arange.default", PUBLIC, 1),
        ("x", "aten.index.Tensor", SHARED, EMBED, [Ref("pick")]),
    ],
    "public entries of tokens": [
        ("pick", "aten.arange.default", PUBLIC, 1),
        ("x", "aten.index.Tensor", CLIENT, IDS, [Ref("pick")]),
    ],
    "parts of a share": [
        ("parts", "aten.split.Tensor", SHARED, EMBED, 1, 2),
        ("x", "sym.getitem", SHARED, Ref("parts"), 0),
    ],
}
"""Near misses: what must go on working."""


@pytest.mark.parametrize("kind", ALLOWED)
def test_what_depends_on_shapes_is_not_refused(kind: str) -> None:
    validate(with_more(decoder.program("client"), *ALLOWED[kind]), "here")


@pytest.mark.parametrize(
    ("noise", "stated", "words"),
    [
        (
            0.0,
            2.0**-8,
            "'logits' (mpc.reveal) reveals with noise 0.0, but the manifest says 0.0039",
        ),
        (2.0**-8, 0.0, "reveals with noise 0.00390625, but the manifest says 0.0;"),
        (2.0**-9, 2.0**-8, "reveals with noise 0.001953125, but the manifest says 0.00390625;"),
        ("x" * 99, 0.0, f"reveals with noise '{'x' * 59}…, but the manifest says 0.0;"),
        (Ref("new"), 0.0, "reveals with noise a computed value, but the manifest says 0.0;"),
    ],
)
def test_the_noise_is_what_the_manifest_says(
    tmp_path: Path, noise: Any, stated: float, words: str
) -> None:
    program = decoder.program("server", noise=noise, logit_noise=stated)
    with pytest.raises(BundleError) as caught:
        save_bundle(program, tmp_path / "b")
    assert words in str(caught.value)
    right = decoder.program("server", noise=2.0**-8)
    assert right.manifest.logit_noise == 2.0**-8
    # A second opening, of which nothing is said.
    last = right.instructions[-1]
    more = dataclasses.replace(last, name="again", args=last.args[:1])
    validate(right, "here")
    right.instructions.append(more)
    with pytest.raises(BundleError, match=r"'again' .* reveals with noise 0.0, but"):
        validate(right, "here")
    right.instructions[-1] = dataclasses.replace(more, kwargs={"noise": 2.0**-8})
    validate(right, "here")


def test_what_is_revealed_is_what_the_manifest_says() -> None:
    logits = decoder.program("client")
    validate(logits, "here")
    logits.manifest = dataclasses.replace(logits.manifest, reveal="token")
    with pytest.raises(BundleError, match="reveals logits, but the manifest says the token alone"):
        validate(logits, "here")
    last = logits.instructions[-1]
    logits.instructions[-1] = dataclasses.replace(last, target="mpc.reveal_token")
    validate(logits, "here")
    logits.manifest = dataclasses.replace(logits.manifest, reveal="logits")
    with pytest.raises(BundleError, match="reveals a token, but the manifest says logits"):
        validate(logits, "here")


def test_a_cache_cannot_make_a_secret_public() -> None:
    """What one step knows as a token would be a public number in the next one."""
    taken = ("taken", "aten.add.Scalar", PUBLIC, Ref("cache.x"), 0)
    for vis, output, words in (
        (PUBLIC, "x", "'cache.x' is public, but caches are shared"),
        (SHARED, "x", "'x' is client, but caches are shared"),
        (CLIENT, "x", "'cache.x' is client, but caches are shared"),
    ):
        items = [("x", "aten.add.Scalar", CLIENT, IDS, 1), *([taken] if vis is PUBLIC else [])]
        program = with_more(decoder.program("client"), *items)
        program.inputs.append(InputSpec("cache.x", vis, "int64", (1, "past"), 0, output))
        program.outputs.append(output)
        with pytest.raises(BundleError, match=words):
            validate(program, "here")


@pytest.mark.parametrize(
    ("phase", "place", "change"),
    [
        ("prompt", 0, {"name": "new"}),  # a public length, which the tokens would stand for
        ("prompt", 0, {"vis": PUBLIC}),
        ("prompt", 1, {"vis": PUBLIC}),
        ("decode", 0, {"name": "new"}),
        ("decode", 0, {"vis": CLIENT}),
        ("finish", 0, {"vis": PUBLIC}),
    ],
)
def test_a_phase_cannot_make_a_secret_public(
    phase: str, place: int, change: dict[str, Any]
) -> None:
    program = decoder.program("client")
    caches = tuple(spec for spec in program.inputs if spec.cache_output)
    names = tuple(spec.cache_output or "" for spec in caches)
    hidden = InputSpec("embed", SHARED, "float32", (1, "new", 8), 16, form="share")
    last = InputSpec("added", SHARED, "float32", (1, "new", 8), 32, form="share")
    program.phases = [
        Phase("prompt", (program.inputs[0], *caches), ("added", *names)),
        Phase("decode", (hidden, *caches), ("added", *names)),
        Phase("finish", (last,), ("logits",)),
    ]
    wrong = {one.name: one for one in program.phases}[phase]
    # Lengths come from the tokens, which a decode step of this program does not have.
    for at, item in enumerate(program.instructions):
        if item.name == "new":
            program.instructions[at] = dataclasses.replace(item, args=(Ref("cache.k"), 2))
    validate(program, "here")
    inputs = list(wrong.inputs)
    inputs[place] = dataclasses.replace(inputs[place], **change)
    place_of = program.phases.index(wrong)
    program.phases[place_of] = dataclasses.replace(wrong, inputs=tuple(inputs))
    with pytest.raises(BundleError, match=f"of the phase {phase} is not"):
        validate(program, "here")


def padded(**change: Any) -> RoleProgram:
    """A program that the client tells how much of its prompt is padding."""
    program = decoder.program("client", pad_token=1)
    number = InputSpec(PADS, CLIENT, "int64", (1,))
    program.inputs.append(dataclasses.replace(number, **change))
    return program


def test_how_much_is_padding_is_one_number_of_the_client_s() -> None:
    validate(padded(), "here")
    for change in (
        {"vis": PUBLIC}, {"vis": SHARED}, {"dtype": "int32"}, {"shape": (2,)}, {"shape": (1, 1)},
        {"cache_output": "logits"},
    ):  # fmt: skip
        with pytest.raises(BundleError, match="'pads' is not one number of the client's"):
            validate(padded(**change), "here")
    for program, token in ((padded(), -1), (decoder.program("client"), 0)):
        program.manifest = dataclasses.replace(program.manifest, pad_token=token)
        with pytest.raises(BundleError, match=f"pad_token is {token}, which does not fit"):
            validate(program, "here")
    first = decoder.program("client")
    first.manifest = dataclasses.replace(first.manifest, pad_token=-1)
    validate(first, "here")
    program = padded()
    program.manifest = dataclasses.replace(program.manifest, pad_token=0)
    validate(program, "here")
    program.phases = [
        Phase(name, tuple(program.inputs), ("logits",)) for name in ("prompt", "decode")
    ]
    with pytest.raises(BundleError, match="pad_token is 0, which does not fit"):
        validate(program, "here")


@pytest.mark.parametrize(
    "names",
    [["prompt"], ["prompt", "decode"], ["decode", "prompt", "finish"], ["prompt", "finish"]],
)
def test_phases_of_a_decoder_are_none_or_three(names: list[str]) -> None:
    program = decoder.program("client")
    program.phases = [Phase(name, tuple(program.inputs), ("logits",)) for name in names]
    with pytest.raises(BundleError, match="the phases are not prompt and decode, and the finish"):
        validate(program, "here")


def test_a_role_that_there_is_not() -> None:
    program = decoder.program("client")
    program.role = "owner"
    with pytest.raises(BundleError, match="here: unknown role 'owner'; one of client, server, d"):
        validate(program, "here")


def test_a_phase_passes_on_what_is_shared() -> None:
    """A hidden state that the client knows would be taken for a shared one by the next step."""
    program = with_more(decoder.program("client"), TOKEN)
    tokens, *caches = program.inputs
    names = [spec.cache_output or "" for spec in caches]
    hidden = InputSpec("embed", SHARED, "float32", (1, "new", 8), 16, form="share")
    last = InputSpec("added", SHARED, "float32", (1, "new", 8), 32, form="share")
    program.phases = [
        Phase("prompt", (tokens, *caches), ("token", *names)),
        Phase("decode", (hidden, *caches), ("added", *names)),
        Phase("finish", (last,), ("logits",)),
    ]
    with pytest.raises(BundleError, match="'token' of the phase prompt is not shared"):
        validate(program, "here")


# ------------------------------------------------------------ what a session does without the above


SIZES = (
    "boolean index",
    "embedding in a public table",
    "repeated by a token",
    "cut at a token",
    "as long as a token",
    "filled with a token",
    "one of a list",
    "by another name",
    "arithmetic of lengths",
)
"""Of these, those that cannot run on shapes alone. The others only fail for some values."""


@pytest.mark.parametrize("kind", SIZES)
def test_a_session_sends_nothing_of_what_depends_on_values(kind: str) -> None:
    """Even if such a program were loaded: the step ends before anybody is told of it."""
    program = used(with_more(decoder.program("client"), *REFUSED[kind][0]))
    link, _ = link_pair(0.1)
    executor = Executor(program, ClientContext(new_seed(), Corrections()), link)
    session = MergecSession(executor, lambda: link.traffic)
    told: list[tuple[int, int]] = []
    tokens = answer(
        session, [5, 1, 7], max_tokens=2, announce=lambda new, past: told.append((new, past))
    )
    with pytest.raises(BundleError) as caught:
        next(tokens)
    assert "do not use this bundle" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert told == []
    assert link.traffic.sent == 0


def test_a_message_that_was_not_rehearsed_is_not_sent() -> None:
    program = decoder.program("client")
    link, _ = link_pair(0.1)
    context = ClientContext(new_seed(), Corrections())
    executor = Executor(program, context, link)
    rounds = Rehearsal(program).step(3, 0)
    (first,) = rounds[0]
    for wrong in (
        [],
        [[first._replace(shape=(1, 2, VOCAB))], *rounds[1:]],
        [[first._replace(dtype=torch.int32)], *rounds[1:]],
        [[first, first], *rounds[1:]],
    ):
        session = MergecSession(executor, lambda: link.traffic)
        executor._constants = Rehearsal(program)._load()
        inputs = {"ids": Held(Vis.CLIENT, torch.tensor([[5, 1, 7]])), **session._start()}
        with pytest.raises(BundleError, match=r"round 1 of this step, of embed, .* was not sent"):
            executor.step(inputs, None, wrong)
        assert link.traffic.sent == 0


@pytest.mark.parametrize("lengths", [(3, 0), (1, 3), (2, 4), (1, 0)])
def test_both_parties_send_what_was_rehearsed(lengths: tuple[int, int]) -> None:
    new, past = lengths
    rounds = Rehearsal(decoder.program("client")).step(new, past)
    sizes = {"client": 0, "server": 0}
    for item in (item for messages in rounds for item in messages):
        size = torch.Size(item.shape).numel() * item.dtype.itemsize
        for role, absent in (("client", "ToClient"), ("server", "ToServer")):
            sizes[role] += size if item.kind.__name__ != absent else 0
    with InProcessSession({role: decoder.program(role) for role in ROLES}) as session:
        if past:
            session.step([1] * past, 0)
        before = [link.traffic.snapshot() for link in session._links]
        session.step([2] * new, past)
        spent = [link.traffic - b for link, b in zip(session._links, before, strict=True)]
    assert [traffic.sent for traffic in spent] == [sizes["client"], sizes["server"]]
    assert {traffic.rounds for traffic in spent} == {len(rounds)}


def test_calls_that_differ_are_rehearsed_apart() -> None:
    """What is remembered of one call must not stand for another one."""
    x, y = Ref("x"), Ref("y")
    calls = [
        ("aten.add.Tensor", (x, y), {}),
        ("aten.add.Tensor", (x, x), {}),
        ("aten.sub.Tensor", (x, y), {}),
        ("aten.add.Tensor", (x, "operand"), {}),
        ("aten.add.Tensor", ("operand", x), {}),
        ("aten.add.Tensor", (x, 1), {}),
        ("aten.add.Tensor", (x, 1.0), {}),
        ("aten.add.Tensor", (x, True), {}),
        ("aten.add.Tensor", (x, [1]), {}),
        ("aten.add.Tensor", (x,), {"other": 1}),
        ("aten.add.Tensor", (x,), {"other": y}),
    ]
    keys = {
        _call(Planned(Instruction("z", target, args, kwargs, Vis.SHARED, 0)))
        for target, args, kwargs in calls
    }
    assert len(keys) == len(calls)
    other = Instruction("w", "aten.add.Tensor", (Ref("a"), Ref("b")), {}, Vis.SHARED, 0)
    assert _call(Planned(other)) in keys


def test_a_rehearsal_knows_no_role() -> None:
    found = [Rehearsal(decoder.program(role)).step(2, 5) for role in ROLES]
    assert found[0] == found[1] == found[2]


def test_an_id_outside_of_the_table_selects_zeros_at_the_same_cost() -> None:
    table = torch.arange(8.0).reshape(4, 2)
    results = []
    for ids in ([[0, 3]], [[4, -1]], [[2**40, 3]]):
        simulation = Simulation()
        words = [torch.empty(4, 2, dtype=torch.int64, device="meta")] * 3
        words[1] = (table * 2**16).long()
        weight = simulation.run(lambda ctx, p, w=words: share_weight(ctx, "w", w[p], 16))
        held = [torch.tensor(ids), *[torch.empty(1, 2, dtype=torch.int64, device="meta")] * 2]
        found = simulation.run(lambda ctx, p, h=held, w=weight: table_rows(ctx, h[p], w[p]))
        rows = (found[0] + found[1]).double() * 2.0**-16
        results.append((rows.tolist(), simulation.cost))
    assert results[0][0] == [[[0.0, 1.0], [6.0, 7.0]]]
    assert results[1][0] == [[[0.0, 0.0], [0.0, 0.0]]]
    assert results[2][0] == [[[0.0, 0.0], [6.0, 7.0]]]
    assert results[0][1] == results[1][1] == results[2][1]


# --------------------------------------------------------------------------- the table as a whole

VALUES: list[Callable[[], torch.Tensor]] = [
    lambda: torch.zeros(2, 3, dtype=torch.int64),
    lambda: torch.full((2, 3), -1),
    lambda: torch.arange(6).reshape(2, 3) * 10**12,
    lambda: torch.tensor([[0.0, -1.0, float("nan")], [float("inf"), 3.0, -0.5]]),
    lambda: torch.ones(2, 3),
    lambda: torch.tensor([[True, False, True], [False, False, False]]),
]


def _arguments(target: str, secret: torch.Tensor) -> list[Any]:
    """One argument for each required parameter of an ATen function."""
    secrets, made = secret_parameters(target), []
    for argument in _overload(target.removeprefix("aten."))._schema.arguments:
        kind = str(argument.type)
        if argument.has_default_value() and "Tensor" not in kind:
            continue
        if argument.kwarg_only:
            continue
        one = torch.zeros(1, dtype=torch.int64) if argument.name not in secrets else secret
        made.append(
            [one] if kind.startswith("List[Opt") or kind == "List[Tensor]"
            else one if "Tensor" in kind
            else [1, 1] if kind == "List[int]" and "repeat" in target
            else [2, 3] if kind == "List[int]"
            else 1 if kind in ("int", "number") and argument.name not in ("dim", "start")
            else 0
        )  # fmt: skip
    return made


def _shapes(target: str, secret: torch.Tensor) -> str:
    """The types and shapes of a function's results, or that it fails."""
    try:
        found = TABLE[target](*_arguments(target, secret))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return "fails"
    results = found if isinstance(found, (list, tuple)) else [found]
    return str([(one.dtype, one.shape) for one in results])


def test_no_secret_value_changes_a_shape_or_makes_a_call_fail() -> None:
    """Of every function that a program may call, where validation lets a secret in."""
    tried = set()
    for target in TABLE:
        if not target.startswith("aten.") or target == SIZE:
            continue
        for make in VALUES:
            meta = make().to("meta")
            if _shapes(target, meta) == "fails":
                continue  # for all values alike: the rehearsal ends the step
            shapes = set()
            for secret in [other() for other in VALUES if other().dtype == meta.dtype]:
                shapes.add(_shapes(target, secret))
            assert shapes in ({_shapes(target, meta)}, {"fails"}), target
            tried.add(target)
    assert len(tried) > 70, sorted(tried)
    assert SECRET_MOVES - {"sym.getitem", SIZE} <= set(TABLE)


def test_a_server_rehearses_as_well() -> None:
    program = used(with_more(decoder.program("server"), *REFUSED["weights, too"][0]))
    link, _ = link_pair(0.1)
    executor = Executor(program, ServerContext(new_seed(), Corrections()), link)
    with pytest.raises(BundleError, match="do not use this bundle"):
        MergecSession(executor, lambda: link.traffic).step(3, 0)
    assert link.traffic.sent == 0
