"""Runs a step on shapes alone, before it runs on values: what it will send follows from lengths.

A party compares each message with its rehearsal before it sends it. So what the other party sees of
sizes, and whether there is a message at all, is a function of the step's lengths and of nothing
else, whatever the program is.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, MergecError
from mergec.runtime.core.messages import (
    Message,
    Protocol,
    Swap,
    ToClient,
    ToServer,
    as_reply,
    as_tuple,
)
from mergec.runtime.core.network import Link, Network, Waiting
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import CLIENT, SERVER, Cost, Vis
from mergec.runtime.core.values import Held, Masked, Sent, Shared, Wide
from mergec.runtime.engine.functions import Call, evaluate
from mergec.runtime.engine.packing import exchange, online_bytes
from mergec.runtime.engine.plan import Plan, Planned
from mergec.runtime.engine.trees import Trees
from mergec.runtime.engine.weights import Constants, load_constants
from mergec.runtime.program.program import Phase, RoleProgram, phase_of


class Form(NamedTuple):
    """What shows of a message to everybody: its kind, and the type and shape of its words."""

    kind: type[Message]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, in each direction that it goes."""
        return math.prod(self.shape) * self.dtype.itemsize


Rounds = list[list[Form]]
"""The messages of a step, round by round, in the order in which they are packed."""


def form(message: Message) -> Form:
    """What shows of a message."""
    return Form(type(message), message.payload.dtype, tuple(message.payload.shape))


@dataclass(frozen=True)
class Part:
    """An instruction as it was rehearsed.

    start: the first of its rounds, if it sends anything. rounds: its messages, by round. result: a
    value without data. forms: what shows of its messages, by round. dealt: bytes that a dealer
    sends for it, by role.
    """

    planned: Planned
    start: int
    rounds: list[list[Message]]
    result: Any
    forms: Rounds
    dealt: Mapping[str, int]


class Played(NamedTuple):
    """A call as it ran on shapes; see `Part`. mark: of its result, see `Rehearsal._mark`."""

    rounds: list[list[Message]]
    result: Any
    forms: Rounds
    dealt: Mapping[str, int]
    mark: int


class Turn(NamedTuple):
    """What a piece of a step sends at once: see `Rehearsal.pieces`. online: bytes, both ways."""

    number: int
    piece: int
    forms: list[Form]
    online: int


class Rehearsal:
    """Runs the steps of a program on shapes. It needs no weights: any role's program will do."""

    def __init__(
        self,
        program: RoleProgram,
        context: ShapeContext | None = None,
        arithmetic: Mapping[str, Any] | None = None,
    ) -> None:
        """context: is told of each round's messages; then every instruction runs in every step.

        arithmetic: without a context, how the parties compute; by default as the manifest says.
        """
        self.program = program
        self.context = context or ShapeContext(**(arithmetic or program.manifest.arithmetic))
        self._watched = context is not None
        self.plan = Plan(program)
        self._trees = Trees(self.plan)
        self._takes_trees = False
        self._setup: list[list[Message]] = []
        self._constants: Constants | None = None
        self._marks: dict[Any, int] = {}
        self._passing = itertools.count(-1, -1)
        self._calls: list[int] = []
        self._lasting: dict[str, int] = {}
        self._orders: dict[tuple[str, bool, tuple[str, ...]], list[int]] = {}
        self._known: dict[tuple[int, ...], Played] = {}
        self._known_now: dict[tuple[int, ...], Played] = {}

    @property
    def setup(self) -> list[list[Message]]:
        """The messages before the first step, which put the constants under masks, by round."""
        self._load()
        return self._setup

    @torch.inference_mode()
    def step(
        self,
        new: int,
        past: int,
        draw: Draw | None = None,
        source: int | None = None,
        parents: Sequence[int] = (),
    ) -> Rounds:
        """The messages of a step of these lengths (`RoleProgram.sizes`).

        parents: of its tokens, if they form a tree (`Branches`). Raises BundleError, naming the
        instruction, if one cannot run on shapes alone: then its result, or whether there is one,
        depends on values.
        """
        return _messages(self.parts(new, past, draw, source, parents=parents))

    @torch.inference_mode()
    def pieces(self, split: int, new: int, past: int, draw: Draw | None = None) -> list[Turn]:
        """The messages of a step of `new` tokens that runs as two pieces, of `split` tokens and the
        rest (`Executor.pieces`): those of each turn, in the order in which they are sent.

        A turn of the first piece comes before that of the second one with the same number.
        """
        caches = {spec.name: spec.cache_output for spec in self.program.inputs if spec.cache_output}
        found: dict[tuple[int, int], Turn] = {}
        ends: dict[str, int] = {}

        def note(piece: int, part: Part) -> None:
            ends[part.planned.name] = part.start + len(part.rounds)
            for number, messages in enumerate(part.rounds, part.start):
                turn = found.setdefault((number, piece), Turn(number, piece, [], 0))
                size = sum(map(online_bytes, messages))
                forms = [*turn.forms, *map(form, messages)]
                found[number, piece] = Turn(number, piece, forms, turn.online + size)

        for part in self.parts(split, past, draw, wanted=tuple(caches.values())):
            note(0, part)
        given = {name: ends[output] for name, output in caches.items()}
        for part in self.parts(new - split, past + split, draw, ends=given):
            note(1, part)
        return [found[key] for key in sorted(found)]

    def parts(
        self,
        new: int,
        past: int,
        draw: Draw | None = None,
        source: int | None = None,
        wanted: tuple[str, ...] | None = None,
        ends: Mapping[str, int] | None = None,
        parents: Sequence[int] = (),
    ) -> Iterator[Part]:
        """Every instruction of a step, in program order; see `step`.

        wanted: outputs of the step, if not all. ends: the rounds in which inputs become known, if
        not at the start; their shapes are.
        """
        branched: Mapping[str, Any] = {}
        if parents:
            self.check_trees()
            branched = self._trees.values(parents, past, self._line)
        if self.context.draw != (draw or Draw()):
            self.context.draw = draw or Draw()
            self._known.clear()
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        self._known_now.clear()
        name = phase_of(new, past)
        phase = self.program.phase(name)
        constants = self._load()
        inputs = {**ghost_inputs(phase, *self.program.sizes(new, past, source)), **branched}
        values = {**constants.held, **inputs}
        marks = {**self._lasting, **{name: self._mark(value) for name, value in inputs.items()}}
        outputs = wanted or tuple(phase.outputs)
        order = name, bool(branched), outputs
        if order not in self._orders:
            self._orders[order] = self.plan.active(inputs, outputs)
        ends = dict(ends or {})
        for position in self._orders[order]:
            planned = self.plan.steps[position]
            refs = planned.refs
            key = (self._calls[position], *[marks[ref] for ref in refs])
            played = self._known.get(key) or self._known_now.get(key)
            if played is None or self._watched:
                played = self._play(planned, [values[ref] for ref in refs], constants)
                # Layers are alike, and so are steps: few instructions have to run. But what has a
                # mark of this step alone means nothing in the next one.
                (self._known if min(key) > 0 else self._known_now)[key] = played
            values[planned.name], marks[planned.name] = played.result, played.mark
            start = max([ends.get(ref, 0) for ref in refs], default=0)
            if planned.reads_shape:
                start = 0  # see `Plan.lengths`
            ends[planned.name] = start + len(played.rounds)
            yield Part(planned, start, *played[:-1])

    @torch.inference_mode()
    def check_trees(self) -> None:
        """Raise BundleError if the program cannot run a step whose tokens form a tree."""
        if not self._takes_trees:
            self._trees.check(self._line)
            self._trees.check_rows(partial(self._results, self._trees.rows))
            self._takes_trees = True

    @torch.inference_mode()
    def sizes(self, new: int, past: int) -> dict[str, Any]:
        """Lengths of secret values in a step; see `Trees.sizes`."""
        return self._results(self._trees.sizes, new, past)

    def _line(self, new: int, past: int) -> dict[str, Any]:
        """What the program computes from these lengths alone; see `Trees`."""
        return self._results(self._trees.names, new, past)

    def _results(self, names: tuple[str, ...], new: int, past: int) -> dict[str, Any]:
        # Lengths do not depend on the choice of a token; another one would forget what was played.
        parts = self.parts(new, past, self.context.draw, wanted=names) if names else ()
        found = {part.planned.name: part.result for part in parts}
        return {name: found[name] for name in names}

    def _load(self) -> Constants:
        if self._constants is None:

            def run(protocol: Protocol) -> Any:
                rounds, result = drive(self.context, protocol)
                self._setup += rounds
                return result

            loaded = load_constants(self.plan, self.context, run, {})
            for planned in self.plan.steps:
                used = (loaded.weights.get(name) for _, name in planned.constants)
                weights = [
                    None if weight is None else (type(weight), weight.frac) for weight in used
                ]
                self._calls.append(self._number((_call(planned), *weights)))
            # Constants stay what they are, public ones, too: each is known by its name.
            self._lasting = {
                name: self._number(_form(value) or name) for name, value in loaded.held.items()
            }
            self._constants = loaded
        return self._constants

    def _number(self, described: Any) -> int:
        """A number above 0, the same for the same description."""
        return self._marks.setdefault(described, len(self._marks) + 1)

    def _mark(self, value: Any) -> int:
        """A number that is the same for values that no call on shapes can tell apart.

        It is below 0, and the value's own, for a public tensor: of that calls can read the data.
        """
        described = _form(value)
        return next(self._passing) if described is None else self._number(described)

    def _play(self, planned: Planned, operands: Sequence[Any], constants: Constants) -> Played:
        """Run an instruction on shapes."""
        before = dict(self.context.dealt)
        try:
            result = evaluate(self.context, planned, operands, constants.weights)
            rounds: list[list[Message]] = []
            if isinstance(result, Call):
                protocol = result.op.protocol(self.context, *result.bound.values())
                rounds, result = drive(self.context, protocol)
        except MergecError:
            raise
        except Exception as error:  # whatever torch raises where there is no data to look at
            item = planned.instruction
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise BundleError(
                f"{planned.name!r} ({item.target}) cannot run on shapes alone ({said}), so sizes "
                "might depend on secrets; nothing of this step was sent; do not use this bundle"
            ) from error
        forms = [[form(message) for message in messages] for messages in rounds]
        dealt = {role: now - before[role] for role, now in self.context.dealt.items()}
        return Played(rounds, result, forms, dealt, self._mark(result))


_REMEMBERED = 1 << 14
"""Calls that are remembered from step to step, before all are forgotten."""


def drive(context: ShapeContext, protocol: Protocol) -> tuple[list[list[Message]], Any]:
    """Run a protocol alone; returns its messages by round, and its result."""
    rounds: list[list[Message]] = []
    reply = None
    while True:
        try:
            yielded = protocol.send(reply)
        except StopIteration as stop:
            return rounds, stop.value
        messages = list(as_tuple(yielded))
        rounds.append(messages)
        context.sent(messages)
        reply = as_reply(yielded, exchange(context, None, messages))


class StepCost(NamedTuple):
    """What a step takes. dealt: bytes dealt for it, by role. rounds: its messages."""

    cost: Cost
    dealt: dict[str, int]
    rounds: Rounds

    def waiting(self, network: Network) -> Waiting:
        """What the step waits for on a network, by its messages.

        The bytes of both directions travel at the same time where both parties send at once, and
        one after the other where the parties take turns.
        """
        count, link = latencies(self.rounds), network.parties
        transfer = exchanged([[forms] for forms in self.rounds], link) - count * link.latency
        return network.waiting(self.cost, self.dealt, count, transfer)


@torch.inference_mode()
def step_cost(
    rehearsal: Rehearsal,
    new: int,
    past: int,
    draw: Draw | None = None,
    source: int | None = None,
    parents: Sequence[int] = (),
) -> StepCost:
    """Rounds and bytes of a step of these lengths; see `Rehearsal.step`."""
    parts = list(rehearsal.parts(new, past, draw, source, parents=parents))
    count, online, dealt = 0, 0, {"client": 0, "server": 0}
    for part in parts:
        count = max(count, part.start + len(part.rounds))
        online += sum(online_bytes(message) for due in part.rounds for message in due)
        for role, size in part.dealt.items():
            dealt[role] += size
    return StepCost(Cost(count, online, sum(dealt.values())), dealt, _messages(parts))


def _messages(parts: Iterable[Part]) -> Rounds:
    """The messages of a step, from its instructions."""
    rounds: Rounds = []
    for part in parts:
        for number, forms in enumerate(part.forms, part.start):
            while len(rounds) <= number:
                rounds.append([])
            rounds[number] += forms
    return rounds


def latencies(rounds: Rounds) -> int:
    """One-way latencies until the client has the result of a step, if all else takes no time.

    rounds: from `Rehearsal.step`. There are at most as many.
    """
    return round(exchanged([[forms] for forms in rounds], Link(1.0, math.inf)))


def exchanged(turns: Sequence[Sequence[Sequence[Form]]], link: Link) -> float:
    """Seconds until the client has the result of a step, if only its messages take time.

    turns: in each, what each piece of the step sends. A party sends what is due as soon as it has
    all that this piece waited for before, and the line is free. An empty message is neither sent
    nor waited for (`transport.channel`), so a party that sends alone in a round goes on at once and
    is then a latency ahead. While both send, each is ahead in turn.
    """
    now, free = [0.0, 0.0], [0.0, 0.0]
    arrives = [[0.0, 0.0] for _ in max(turns, key=len, default=())]
    for turn in turns:
        for piece, forms in enumerate(turn):
            now = list(map(max, now, arrives[piece]))
            for party, kinds in ((CLIENT, (Swap, ToServer)), (SERVER, (Swap, ToClient))):
                size = sum(form.nbytes for form in forms if form.kind in kinds)
                if size:
                    free[party] = max(free[party], now[party]) + size / link.bandwidth
                    arrives[piece][SERVER - party] = free[party] + link.latency
    return max([now[CLIENT], *(both[CLIENT] for both in arrives)])


def overlapped_seconds(
    rehearsal: Rehearsal, split: int, new: int, past: int, network: Network
) -> float:
    """Seconds that a step in two pieces waits for messages, by the cost model.

    While a message of one piece is on its way, the line carries the other one's.
    """
    messages = rehearsal.pieces(split, new, past)
    return exchanged(by_turn(messages), network.parties) + len(messages) * network.overhead


def by_turn(messages: Sequence[Turn]) -> list[list[list[Form]]]:
    """What both pieces of a step send, turn by turn, as `exchanged` takes it."""
    turns: list[list[list[Form]]] = [[[], []] for _ in range(messages[-1].number + 1)]
    for message in messages:
        turns[message.number][message.piece] = message.forms
    return turns


def call_dealt(op: type[Op], fixed: int, exact: bool, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Bytes that a dealer sends for a call whose operands have shapes alone, by role.

    fixed, exact: see `Context`.
    """
    context = ShapeContext(fixed=fixed, exact=exact)
    drive(context, op.protocol(context, *args, **kwargs))
    return context.dealt


def _call(planned: Planned) -> str:
    """What an instruction calls: all arguments but its operands, and which of these are one."""
    item, names = planned.instruction, planned.refs
    same = [names.index(name) for name in names]
    nested = [item.target, item.args, sorted(item.kwargs.items()), same]
    # No literal is an object, so no literal looks like an operand.
    return json.dumps(nested, default=lambda _: {})


def _form(value: Any) -> Any:
    """All that a call can depend on where secrets have no data; None where there may be data."""
    if isinstance(value, Shared):
        return Shared, value.share.shape, value.share.dtype, value.frac
    if isinstance(value, Wide):
        return Wide, value.low.shape, value.frac
    if isinstance(value, (Masked, Sent)):
        return type(value), value.opened.shape, value.frac, value.room is None
    if isinstance(value, Held):
        return value.vis, value.value.shape, value.value.dtype
    if isinstance(value, (bool, int, float)):
        return type(value), value
    if isinstance(value, list):
        forms = tuple(map(_form, value))
        return None if None in forms else (list, forms)
    return None


def ghost_inputs(part: Phase | RoleProgram, new: int, past: int, source: int = 0) -> dict[str, Any]:
    """The inputs of one step as meta tensors, in the forms that the program expects.

    new, past, source: as from `RoleProgram.sizes`.
    """
    inputs: dict[str, Any] = {}
    for spec in part.inputs:
        shape = spec.shape_of(new, past, source)
        words = torch.empty(shape, dtype=torch.int64, device="meta")
        if spec.form == "share":
            inputs[spec.name] = Shared(words, spec.frac)
        elif spec.vis is Vis.SHARED:
            kind = Sent if spec.form == "sent" else Masked
            inputs[spec.name] = kind(words, words, spec.frac)
        else:
            dtype = getattr(torch, spec.dtype.removeprefix("torch."))
            held = torch.empty(shape, dtype=dtype, device="meta")
            inputs[spec.name] = Held(spec.vis, held)
    return inputs
