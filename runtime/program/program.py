"""The program of one role: a list of instructions, inputs, outputs and tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergec.runtime.core.memory import WordsFile
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

    shape: numbers, "new" (tokens of this step), "past" (cached tokens), "past+new", or "source"
    (tokens that the encoder of an encoder-decoder read).
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

    def shape_of(self, new: int, past: int, source: int = 0) -> list[int]:
        """The shape in a step of these lengths, as from `RoleProgram.sizes`."""
        lengths = {"new": new, "past": past, "past+new": past + new, "source": source}
        return [lengths[size] if isinstance(size, str) else size for size in self.shape]


PADS = "pads"
"""The input by which the client says how many tokens at the beginning of the text are padding: one
number, which only the client knows. Programs have it by `CompileConfig.pad_prompt` alone."""


def is_text(spec: InputSpec) -> bool:
    """Whether an input is tokens, which the client holds."""
    return spec.vis is Vis.CLIENT and spec.name != PADS


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

    An input may be the result of an instruction, which then does not run. The first input (in the
    prompt of an encoder-decoder, the first two) and the first output are those of the phase itself;
    caches follow.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]


PROMPT, DECODE, FINISH = "prompt", "decode", "finish"
"""Phases of a program that resends its hidden state: tokens to hidden state, hidden state to hidden
state, and all hidden states [1, new, E] to the logits of every token. Of an encoder-decoder: the
source's tokens and the answer's first one to logits and to the keys and values of cross-attention;
and further tokens, with these, to logits; it has a finish only if it also resends its hidden state,
which then takes the place of these logits and of the further tokens."""

BEGUN = 1
"""Tokens of an encoder-decoder's answer that its prompt takes: the one that every answer begins
with (`Manifest.answer_start`)."""


@dataclass
class RoleProgram:
    """What one role runs.

    tensors: data of those constants that the role may know, by name.
    phases: empty if a step is always the whole program.
    words: at a server that was read from a bundle, weights as fixed-point integers, each with the
    one of `tensors` that it was made of. words_file: the file in which these lie.
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
    words_file: WordsFile | None = field(default=None, compare=False, repr=False)

    @property
    def resends(self) -> bool:
        """Whether each step takes the hidden state of the step before; tokens come at the end."""
        return any(phase.name == FINISH for phase in self.phases)

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder-decoder: the prompt is a source text of its own."""
        return bool(self.phases) and any("source" in spec.shape for spec in self.inputs)

    @property
    def pads(self) -> bool:
        """Whether prompts may be padded on the left, by as much as only the client knows."""
        return any(spec.name == PADS for spec in self.inputs)

    def phase(self, name: str) -> Phase:
        """A phase by its name; the whole program if it has no phases."""
        if not self.phases:
            return Phase(name, tuple(self.inputs), tuple(self.outputs))
        return next(phase for phase in self.phases if phase.name == name)

    def sizes(self, new: int, past: int, source: int | None = None) -> tuple[int, int, int]:
        """What "new", "past" and "source" in the shapes of a step's inputs stand for.

        new, past: of the step, as in `runtime.session.steps.Session.step`. In a decode step of an
        encoder-decoder `past` counts the tokens of the source and those of the answer that were
        generated. source: the tokens of the source; by default all of `past`.
        """
        if new == 0:
            return past, 0, 0
        if not self.encodes:
            return new, past, 0
        if past == 0:
            return BEGUN, 0, new
        source = past if source is None else source
        return new, past - source + BEGUN, source


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
