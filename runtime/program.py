"""The program of one role: a linear instruction list, its inputs, outputs and tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runtime.spec import Vis

FORMAT_VERSION = 1
"""Raised whenever an older runtime could misread a bundle."""


@dataclass(frozen=True)
class Ref:
    """An instruction argument that names a value: an input, a tensor, or an earlier result."""

    name: str


@dataclass(frozen=True)
class Instruction:
    """One op of the program.

    name: the value that it defines, unique, such as `layers.3.attn.scores`.
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
    """An input of one step. shape: ints, "new" (tokens of this step), "past" (cached tokens)."""

    name: str
    vis: Vis
    dtype: str
    shape: tuple[int | str, ...]
    frac: int = 0
    cache_output: str | None = None
    """For a cache input: the output that is its value in the next step."""
    form: str = "masked"
    """For a shared input: how it is held, opened under a mask to both ("masked") or to the server
    alone ("sent")."""


@dataclass(frozen=True)
class TensorSpec:
    """A constant: a weight (server, or shared) or a table that all know (public)."""

    name: str
    vis: Vis
    dtype: str
    shape: tuple[int, ...]


@dataclass
class RoleProgram:
    """What one role runs. `tensors` holds data for those constants that the role may know."""

    role: str
    instructions: list[Instruction]
    inputs: list[InputSpec]
    outputs: list[str]
    constants: list[TensorSpec]
    tensors: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
