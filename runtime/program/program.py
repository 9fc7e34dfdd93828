"""The program of one role: a list of instructions, inputs, outputs and tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergec.runtime.core.spec import Vis
from mergec.runtime.program.manifest import Manifest


@dataclass(frozen=True)
class Ref:
    """An instruction argument that names a value: an input, a tensor, or an earlier result."""

    name: str


@dataclass(frozen=True)
class Instruction:
    """One op of the program.

    name: the value that it defines; unique, such as `layers.3.attn.scores`.
    target: `mpc.linear`, `aten.view.default`, or `sym.add` for arithmetic on public lengths.
    args, kwargs: literals, `Ref`s, and lists of either, in the order of the op's schema.
    vis: who knows the result. frac: fractional bits of the result's shares (shared results only).
    module, source: where in the user's model it comes from.
    """

    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    vis: Vis
    frac: int
    module: str = ""
    source: str = ""


@dataclass(frozen=True)
class InputSpec:
    """An input of one step.

    shape: numbers, "new" (tokens of this step), "past" (cached tokens), or "past+new".
    frac: fractional bits of a shared input.
    """

    name: str
    vis: Vis
    dtype: str
    shape: tuple[int | str, ...]
    frac: int = 0
    cache_output: str | None = None
    """For a cache input: the output that is its value in the next step."""
    form: str = "masked"
    """For a shared input: how it is held, opened under a mask to both ("masked"), to the server
    alone ("sent"), or not at all ("share")."""


@dataclass(frozen=True)
class TensorSpec:
    """A constant: a weight (server, or shared) or a table that all know (public)."""

    name: str
    vis: Vis
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Phase:
    """The instructions that lead from `inputs` to `outputs`, run by themselves.

    An input may be the result of an instruction, which then does not run. The first input and the
    first output are those of the phase itself; caches follow.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]


PROMPT, DECODE, FINISH = "prompt", "decode", "finish"
"""Phases of a program that resends its hidden state: tokens to hidden state, hidden state to hidden
state, and all hidden states [1, new, E] to the logits of every token."""


@dataclass
class RoleProgram:
    """What one role runs.

    tensors: data of those constants that the role may know, by name.
    phases: empty if a step is always the whole program.
    words: at a server that was read from a bundle, weights as fixed-point integers, each with the
    one of `tensors` that it was made of.
    """

    role: str
    instructions: list[Instruction]
    inputs: list[InputSpec]
    outputs: list[str]
    constants: list[TensorSpec]
    tensors: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest = field(default_factory=Manifest)
    phases: list[Phase] = field(default_factory=list)
    words: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def resends(self) -> bool:
        """Whether each step takes the hidden state of the step before; tokens come at the end."""
        return bool(self.phases)

    def phase(self, name: str) -> Phase:
        """A phase by its name; the whole program if it has no phases."""
        if not self.phases:
            return Phase(name, tuple(self.inputs), tuple(self.outputs))
        return next(phase for phase in self.phases if phase.name == name)


def phase_of(new: int, past: int) -> str:
    """The phase of a step: first the prompt, then decode steps; the finish has no new tokens."""
    if new == 0:
        return FINISH
    return DECODE if past else PROMPT


def needed(
    defined: Sequence[tuple[str, Collection[str]]], given: Collection[str], wanted: Collection[str]
) -> list[int]:
    """Positions of the instructions that lead from the given values to the wanted ones, in order.

    defined: name and operands of each instruction.
    """
    asked = set(wanted) - set(given)
    found = []
    for index in range(len(defined) - 1, -1, -1):
        name, operands = defined[index]
        if name in asked:
            found.append(index)
            asked.update(operand for operand in operands if operand not in given)
    return found[::-1]
