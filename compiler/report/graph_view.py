"""A graph as text, as DOT and as ONNX."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from mergec.compiler.report.text import graph_text
from mergec.compiler.text import layer_of
from mergec.runtime.core.spec import Vis
from mergec.runtime.program.encoding import refs
from mergec.runtime.program.program import Instruction, RoleProgram

if TYPE_CHECKING:
    import onnx

    from mergec.compiler.backend.onnx_export import ValueType

_FILLS = {
    Vis.PUBLIC: "#eceff1",
    Vis.CLIENT: "#cfe8ff",
    Vis.SERVER: "#e2d9f7",
    Vis.SHARED: "#ffe3c2",
}


_STYLE = "max-height:32em; overflow:auto; white-space:pre; font-family:monospace"


@dataclass(frozen=True)
class GraphView:
    """The graph of one step, before or after the passes.

    `print` and notebooks show its text, one line per instruction.

    types: dtypes and shapes of results, where known.
    """

    program: RoleProgram
    types: Mapping[str, ValueType]

    def __str__(self) -> str:
        return graph_text(self.program, self.types)

    def _repr_html_(self) -> str:
        """The text, for notebooks."""
        return f'<pre style="{_STYLE}">{escape(str(self))}</pre>'

    def to_onnx(self) -> onnx.ModelProto:
        """The graph for viewers such as Netron: names and shapes, no weights. It cannot be run."""
        from mergec.compiler.backend.onnx_export import to_onnx

        return to_onnx(self.program, self.types)

    def to_dot(self) -> str:
        """The graph for Graphviz: a cluster per layer; a node's colour says who knows its value."""
        lines = [
            "digraph step {",
            '  node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=10];',
            '  edge [color="#78909c", arrowsize=0.6];',
        ]
        lines += [f"  {_node(spec.name, 'input', spec.vis)}" for spec in self.program.inputs]
        clusters: dict[str, list[Instruction]] = {}
        for item in self.program.instructions:
            clusters.setdefault(layer_of(item.module), []).append(item)
        for number, (layer, items) in enumerate(clusters.items()):
            lines.append(f"  subgraph cluster_{number} {{")
            lines.append(f'    label={json.dumps(layer)}; color="#b0bec5"; fontname="Helvetica";')
            lines += [f"    {_node(item.name, item.target, item.vis)}" for item in items]
            lines.append("  }")
        lines += [f"  {json.dumps(a)} -> {json.dumps(b)};" for a, b in edges(self.program)]
        return "\n".join([*lines, "}"]) + "\n"


def edges(program: RoleProgram) -> Iterator[tuple[str, str]]:
    """From each input or result to the instructions that read it; constants are not nodes."""
    known = {spec.name for spec in program.inputs} | {i.name for i in program.instructions}
    for item in program.instructions:
        for source in dict.fromkeys(operands(item)):
            if source in known:
                yield source, item.name


def operands(item: Instruction) -> list[str]:
    """Names of the values and constants that an instruction reads, in order."""
    given: list[Any] = [*item.args, *item.kwargs.values()]
    return [ref.name for ref in refs(given)]


def _node(name: str, target: str, vis: Vis) -> str:
    label = json.dumps(f"{name}\n{target}")
    return f'{json.dumps(name)} [label={label}, fillcolor="{_FILLS[vis]}"];'
