"""Runs a step on shapes alone, before it runs on values: what it will send follows from lengths.

A party compares each message with its rehearsal before it sends it. So what the other party sees of
sizes, and whether there is a message at all, is a function of the step's lengths and of nothing
else, whatever the program is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, MergecError
from mergec.runtime.core.messages import Message, Protocol, as_reply, as_tuple
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.values import Held, Masked, Sent, Shared
from mergec.runtime.engine.functions import Call, evaluate
from mergec.runtime.engine.packing import exchange
from mergec.runtime.engine.plan import Plan, Planned
from mergec.runtime.engine.weights import Constants, load_constants
from mergec.runtime.program.program import FINISH, Phase, RoleProgram, phase_of


class Form(NamedTuple):
    """What shows of a message to everybody: its kind, and the type and shape of its words."""

    kind: type[Message]
    dtype: torch.dtype
    shape: tuple[int, ...]


Rounds = list[list[Form]]
"""The messages of a step, round by round, in the order in which they are packed."""


def form(message: Message) -> Form:
    """What shows of a message."""
    return Form(type(message), message.payload.dtype, tuple(message.payload.shape))


@dataclass(frozen=True)
class Part:
    """An instruction as it was rehearsed.

    start: the first of its rounds, if it sends anything. rounds: its messages, by round. result: a
    value without data.
    """

    planned: Planned
    start: int
    rounds: list[list[Message]]
    result: Any


class Rehearsal:
    """Runs the steps of a program on shapes. It needs no weights: any role's program will do."""

    def __init__(self, program: RoleProgram, context: ShapeContext | None = None) -> None:
        """context: is told of each round's messages; then every instruction runs in every step."""
        self.program = program
        self.context = context or ShapeContext(**program.manifest.arithmetic)
        self._watched = context is not None
        self.plan = Plan(program)
        self._setup: list[list[Message]] = []
        self._constants: Constants | None = None
        self._calls = [_call(planned) for planned in self.plan.steps]
        self._known: dict[Any, Played] = {}
        self._known_now: dict[Any, Played] = {}

    @property
    def setup(self) -> list[list[Message]]:
        """The messages before the first step, which put the constants under masks, by round."""
        self._load()
        return self._setup

    @torch.inference_mode()
    def step(self, new: int, past: int, draw: Draw | None = None) -> Rounds:
        """The messages of a step of these lengths.

        Raises BundleError, naming the instruction, if one cannot run on shapes alone: then its
        result, or whether there is one, depends on values.
        """
        rounds: Rounds = []
        for part in self.parts(new, past, draw):
            for number, messages in enumerate(part.rounds, part.start):
                while len(rounds) <= number:
                    rounds.append([])
                rounds[number] += map(form, messages)
        return rounds

    def parts(self, new: int, past: int, draw: Draw | None = None) -> Iterator[Part]:
        """Every instruction of a step, in program order; see `step`."""
        if self.context.draw != (draw or Draw()):
            self.context.draw = draw or Draw()
            self._known.clear()
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        self._known_now.clear()
        name = phase_of(new, past)
        phase = self.program.phase(name)
        lengths = (past, 0) if name == FINISH else (new, past)
        constants = self._load()
        values = {**constants.held, **ghost_inputs(phase, *lengths)}
        given = frozenset(spec.name for spec in phase.inputs)
        ends: dict[int, int] = {}
        for position in self.plan.active(given, phase.outputs):
            planned = self.plan.steps[position]
            operands = [values[ref] for ref in planned.refs]
            rounds, result = self._play(position, operands, constants)
            values[planned.name] = result
            start = max((ends.get(i, 0) for i in self.plan.dependencies[position]), default=0)
            ends[position] = start + len(rounds)
            yield Part(planned, start, rounds, result)

    def _load(self) -> Constants:
        if self._constants is None:

            def run(protocol: Protocol) -> Any:
                rounds, result = drive(self.context, protocol)
                self._setup += rounds
                return result

            self._constants = load_constants(self.plan, self.context, run, {})
        return self._constants

    def _play(self, position: int, operands: Sequence[Any], constants: Constants) -> Played:
        """The messages of an instruction, and its result; remembered for operands of one form.

        Layers are alike, and so are steps: few instructions have to run.
        """
        planned = self.plan.steps[position]
        forms: list[Any] = [self._calls[position]]
        used = (constants.weights.get(name) for _, name in planned.constants)
        forms += [None if weight is None else (type(weight), weight.frac) for weight in used]
        lasting = _add_forms(forms, operands)
        key, known = tuple(forms), self._known if lasting else self._known_now
        if key in known and not self._watched:
            return known[key]
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
        known[key] = rounds, result
        return rounds, result


Played = tuple[list[list[Message]], Any]
"""The messages of an instruction, by round, and its result."""

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


def _call(planned: Planned) -> str:
    """What an instruction calls: all arguments but its operands, and which of these are one."""
    item, names = planned.instruction, planned.refs
    same = [names.index(name) for name in names]
    nested = [item.target, item.args, sorted(item.kwargs.items()), same]
    # No literal is an object, so no literal looks like an operand.
    return json.dumps(nested, default=lambda _: {})


def _add_forms(forms: list[Any], values: Sequence[Any]) -> bool:
    """Append all that a call can depend on where secrets have no data.

    Public tensors are told apart as objects. Returns whether there are none, so that the forms mean
    the same in another step.
    """
    lasting = True
    for value in values:
        if isinstance(value, Shared):
            forms.append((Shared, value.share.shape, value.share.dtype, value.frac))
        elif isinstance(value, (Masked, Sent)):
            forms.append((type(value), value.opened.shape, value.frac, value.room is None))
        elif isinstance(value, Held):
            forms.append((value.vis, value.value.shape, value.value.dtype))
        elif isinstance(value, (bool, int, float)):
            forms.append((type(value), value))
        elif isinstance(value, list):
            forms.append(len(value))
            lasting &= _add_forms(forms, value)
        else:
            forms.append(id(value))
            lasting = False
    return lasting


def ghost_inputs(part: Phase | RoleProgram, new: int, past: int) -> dict[str, Any]:
    """The inputs of one step as meta tensors, in the forms that the program expects."""
    lengths = {"new": new, "past": past, "past+new": past + new}
    inputs: dict[str, Any] = {}
    for spec in part.inputs:
        shape = [lengths[size] if isinstance(size, str) else size for size in spec.shape]
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
