"""A program as functions of its operands, and the order in which these may run.

The executor, the cost model and the choice of protocols all read the same `Plan`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from mergec.runtime.core.op import REGISTRY, Op
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import SIZE, decode_literal, function
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import Instruction, Ref, RoleProgram, needed

_CPU = torch.device("cpu")

LATER = frozenset({"reach", "pads", "sink", "apart", "alone", "span", "coarse"})
"""Parameters that ops got after programs were first written: left out where they say nothing, so
that a program without them, and its hash, stay as they are."""


@dataclass(frozen=True)
class Schedule:
    """The part of a step that follows from the names of its inputs and outputs alone.

    Instructions are numbered by their position in the program.
    consumers: for each instruction, those that wait for its result.
    left: for each instruction, how many others it waits for.
    uses: how often each value is read; once more for each wanted output.
    ready: the instructions that can start at once, in program order.
    """

    consumers: list[list[int]]
    left: list[int]
    uses: dict[str, int]
    ready: list[int]


class Plan:
    """A program's instructions with everything looked up that does not depend on their operands.

    steps: one `Planned` per instruction, in program order.
    dependencies: for each instruction, the positions of those whose results it reads.

    Raises KeyError if an instruction calls an op or a function that is not registered.
    """

    def __init__(self, program: RoleProgram, device: torch.device = _CPU) -> None:
        """device: where tensor literals go."""
        load_all()
        self.program = program
        self.steps = [Planned(item, device) for item in program.instructions]
        index = {planned.name: i for i, planned in enumerate(self.steps)}
        self.dependencies = [
            {index[name] for name in planned.refs if name in index} for planned in self.steps
        ]
        self._defined = [(planned.name, planned.refs) for planned in self.steps]
        self._schedules: dict[tuple[frozenset[str], tuple[str, ...]], Schedule] = {}

    def active(self, given: Collection[str], wanted: Collection[str]) -> list[int]:
        """The instructions that lead from the given values to the wanted ones, in program order."""
        return needed(self._defined, given, wanted)

    def lengths(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """The results of the instructions that read nothing but the shape of one of these inputs.

        So a step need not wait for an input of a known shape to know its lengths.
        """
        found = {}
        for planned in self.steps:
            if planned.reads_shape and planned.refs[0] in inputs:
                found[planned.name] = planned.call(inputs[planned.refs[0]])
        return found

    def schedule(self, given: frozenset[str], wanted: tuple[str, ...]) -> Schedule:
        """The schedule of a step; computed once for each pair of arguments.

        An input may stand for the result of an instruction, which then does not run. Linear in the
        number of operands.
        """
        if (given, wanted) not in self._schedules:
            self._schedules[given, wanted] = self._schedule(given, wanted)
        return self._schedules[given, wanted]

    def _schedule(self, given: frozenset[str], wanted: tuple[str, ...]) -> Schedule:
        active = self.active(given, wanted)
        runs = set(active)
        uses = Counter(wanted)
        consumers: list[list[int]] = [[] for _ in self.steps]
        left = [0] * len(self.steps)
        for i in active:
            uses.update(self.steps[i].refs)
            operands = self.dependencies[i] & runs
            left[i] = len(operands)
            for j in operands:
                consumers[j].append(i)
        return Schedule(consumers, left, dict(uses), [i for i in active if not left[i]])

    @cached_property
    def weight_bits(self) -> dict[str, int]:
        """Constants that an op uses under a static mask, by name: the server's, held or shared.

        The value is the number of fractional bits that the constant has beyond the program's.
        """
        secret = {spec.name for spec in self.program.constants if spec.vis is not Vis.PUBLIC}
        return {
            name: planned.argument("bits") or 0
            for planned in self.steps
            if planned.op is not None and planned.instruction.vis is Vis.SHARED
            for _, name in planned.constants
            if name in secret
        }

    @cached_property
    def weight_parts(self) -> dict[str, Sequence[int]]:
        """Constants of which some rows have further fractional bits, by name; see `mpc.linear`."""
        found = {}
        for planned in self.steps:
            parts = planned.argument("parts") if planned.op is not None else None
            if parts:
                found[planned.argument("weight").name] = parts
        return found

    @cached_property
    def in_the_clear(self) -> frozenset[str]:
        """Every value that some instruction reads other than under a static mask."""
        return frozenset(name for planned in self.steps for name in planned.in_the_clear())


class Planned:
    """An instruction as a function of its operands; all else is looked up before the first step.

    name: the value that it defines.
    op: the dialect op that it calls; None for a structural function or arithmetic on lengths.
    refs: the names of its operands, in the order of the arguments.
    parameters: the names of the op's arguments; empty without an op.
    constants: the parameters that take weights, each with the name of the constant given for it.
    """

    def __init__(self, instruction: Instruction, device: torch.device = _CPU) -> None:
        self.instruction = instruction
        self.name, target = instruction.name, instruction.target
        self.op: type[Op] | None = REGISTRY[target[4:]] if target.startswith("mpc.") else None
        self.parameters: tuple[str, ...] = ()
        self._keywords: tuple[str, ...] = ()
        self._defaults: dict[str, Any] = {}
        if self.op is None:
            self._function = function(target)
            self._keywords = tuple(instruction.kwargs)
            arguments = [*instruction.args, *instruction.kwargs.values()]
        else:
            self._function = self.op.reference
            self._defaults = _defaults(self.op.reference)
            self.parameters = tuple(self._defaults)
            arguments = list(self.bind(instruction.args, instruction.kwargs).values())
        self.refs = list(_refs(arguments))
        self._arguments = [_decoded(argument, device) for argument in arguments]
        self._open = [(i, arg) for i, arg in enumerate(self._arguments) if any(_refs([arg]))]
        weights = self.op.weights if self.op is not None else ()
        named = [(parameter, self.argument(parameter)) for parameter in weights]
        self.constants = [(key, arg.name) for key, arg in named if isinstance(arg, Ref)]

    def arguments(self, operands: Sequence[Any]) -> list[Any]:
        """All arguments, with the operands in place of the references, in the order of `refs`."""
        rest = iter(operands)
        found = self._arguments.copy()
        for place, argument in self._open:
            found[place] = next(rest) if isinstance(argument, Ref) else _filled(argument, rest)
        return found

    def call(self, *operands: Any) -> Any:
        """Apply the function, or the op's reference in the clear, to these operands."""
        return self.apply(self.arguments(operands))

    def apply(self, arguments: Sequence[Any]) -> Any:
        """Apply the same to all arguments, literals included."""
        if not self._keywords:
            return self._function(*arguments)
        cut = len(arguments) - len(self._keywords)
        named = zip(self._keywords, arguments[cut:], strict=True)
        return self._function(*arguments[:cut], **dict(named))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters of the op by name, defaults filled in, in the order of the schema."""
        return {**self._defaults, **dict(zip(self._defaults, args, strict=False)), **kwargs}

    @staticmethod
    def written(arguments: Mapping[str, Any], optional: Collection[str]) -> dict[str, Any]:
        """The arguments of a call as programs write them: those at the end that are as by default,
        which is 0, False or nothing, are left out, as far as `optional` names them."""
        found = dict(arguments)
        while found and (last := next(reversed(found))) in optional and not found[last]:
            del found[last]
        return found

    @property
    def reads_shape(self) -> bool:
        """Whether the result follows from the shape of the operand."""
        return self.instruction.target == SIZE

    def in_the_clear(self) -> list[str]:
        """What the instruction reads, without the weights that it uses under static masks."""
        names = list(self.refs)
        if self.instruction.vis is Vis.SHARED:
            for _, name in self.constants:
                names.remove(name)
        return names

    def argument(self, parameter: str) -> Any:
        """A parameter's argument as the program holds it; None if the op has no such parameter."""
        return self.bind(self.instruction.args, self.instruction.kwargs).get(parameter)


@cache
def _defaults(reference: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of an op with their defaults; None for one that has no default."""
    parameters = inspect.signature(reference).parameters
    return {
        name: None if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in parameters.items()
    }


def _decoded(arg: Any, device: torch.device) -> Any:
    """An argument with its literals decoded; references stay."""
    if isinstance(arg, (list, tuple)):
        return [_decoded(item, device) for item in arg]
    return arg if isinstance(arg, Ref) else decode_literal(arg, device)


def _filled(arg: Any, operands: Iterator[Any]) -> Any:
    """A decoded argument with the next operands in place of its references."""
    if isinstance(arg, list):
        return [_filled(item, operands) for item in arg]
    return next(operands) if isinstance(arg, Ref) else arg


def _refs(args: Sequence[Any]) -> Iterator[str]:
    for arg in args:
        if isinstance(arg, Ref):
            yield arg.name
        elif isinstance(arg, (list, tuple)):
            yield from _refs(arg)
