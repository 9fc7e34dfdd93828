"""Instructions, shapes and sizes as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergec.compiler.text import call_text, dtype_text, literal, place_text
from mergec.runtime.core.spec import Vis
from mergec.runtime.program.program import InputSpec, Instruction, RoleProgram, TensorSpec

if TYPE_CHECKING:
    from mergec.compiler.backend.onnx_export import ValueType


def graph_text(program: RoleProgram, types: Mapping[str, ValueType] | None = None) -> str:
    """A program as text, one line per instruction.

    types: dtypes and shapes of results, where known. The same program always has the same text, so
    that two programs can be compared with `diff`.
    """
    known = types or {}
    lines = []
    for spec in program.inputs:
        then = f" -> {spec.cache_output}" if spec.cache_output else ""
        lines.append(f"%{spec.name} = input : {_declared(spec)}{then}")
    lines += [f"%{spec.name} = constant : {_declared(spec)}" for spec in program.constants]
    for item in program.instructions:
        shape = f" {shape_text(known[item.name].shape)}" if item.name in known else ""
        lines.append(instruction_text(item) + shape + place_text(item.module, item.source))
    lines.append(f"return [{', '.join(f'%{name}' for name in program.outputs)}]")
    return "\n".join(lines) + "\n"


def instruction_text(item: Instruction) -> str:
    """One instruction: `%result = target(arguments) : visibility` and its fractional bits."""
    text = call_text(item.name, item.target, item.args, item.kwargs, _text)
    frac = f" f{item.frac}" if item.vis is Vis.SHARED and item.frac else ""
    return f"{text} : {item.vis.value}{frac}"


def _declared(spec: InputSpec | TensorSpec) -> str:
    """The type of an input or of a constant."""
    words = (spec.vis.value, dtype_text(spec.dtype), shape_text(spec.shape))
    return " ".join(filter(None, words))


def shape_text(shape: Sequence[int | str]) -> str:
    """`1x9xpast+new`."""
    return "x".join(str(size).replace(" ", "") for size in shape) or "scalar"


def readable(count: float, unit: str = "B") -> str:
    """A number of bytes with a decimal unit: 1,204 B, 3.4 MB."""
    for scale, prefix in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if abs(count) >= scale:
            return f"{count / (1000 if prefix == 'k' else scale):,.1f} {prefix}{unit}"
    return f"{count:,.0f} {unit}"


def _text(value: Any) -> str:
    return literal(value, lambda ref: f"%{ref.name}")
