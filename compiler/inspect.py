"""What a compiled program does and costs, as tables: by op, by layer, by pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compiler.cost import CostReport, CostRow
from runtime.program import Ref, RoleProgram
from runtime.spec import Vis


@dataclass(frozen=True)
class Row:
    """Instructions of one kind, or of one place in the model.

    rounds: those on the critical path, so that the rows add up to the rounds of a step.
    share: of the step's online bytes.
    """

    key: str
    count: int
    vis: str
    rounds: int
    online: int
    offline: int
    share: float


@dataclass(frozen=True)
class Inspection:
    """The tables of one program at one step's lengths."""

    model: str
    new: int
    past: int
    total: Row
    by_op: list[Row]
    by_layer: list[Row]
    passes: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def to_markdown(self) -> str:
        title = f"## {self.model}: a step of {self.new} new after {self.past} cached tokens"
        facts = "\n".join(f"* {key.replace('_', ' ')}: {v}" for key, v in self.facts.items())
        parts = [title, *([facts] if facts else [])]
        for heading, cells in self._tables():
            head, *body = cells
            lines = [
                f"| {' | '.join(head)} |",
                f"|{'|'.join(['---'] + ['---:'] * (len(head) - 1))}|",
            ]
            lines += [f"| {' | '.join(row)} |" for row in body]
            parts += [f"### {heading}", "\n".join(lines)]
        return "\n\n".join(parts) + "\n"

    def render(self) -> RenderableType:
        """For a terminal."""
        shown: list[RenderableType] = [
            Text(f"{self.model}: a step of {self.new} new after {self.past} cached tokens", "bold")
        ]
        for key, value in self.facts.items():
            shown.append(Text(f"  {key.replace('_', ' ')}: {value}"))
        for heading, (head, *body) in self._tables():
            table = Table(title=heading, title_justify="left", header_style="bold", box=SIMPLE)
            for index, name in enumerate(head):
                if index == 0:
                    table.add_column(name, min_width=max(len(row[0]) for row in body))
                else:
                    table.add_column(name, justify="right")
            for row in body:
                last = row is body[-1] and row[0] == "total"
                table.add_row(*(Text(cell) for cell in row), style="bold" if last else "")
            shown.append(table)
        return Group(*shown)

    def _tables(self) -> Iterable[tuple[str, list[list[str]]]]:
        yield "By op", _cost_cells("op", [*self.by_op, self.total])
        yield "By layer", _cost_cells("layer", [*self.by_layer, self.total], vis=False)
        if self.passes:
            keys = list(self.passes[0])
            rows = [[str(entry.get(key, "")) for key in keys] for entry in self.passes]
            yield "Passes", [keys, *rows]


def inspect_costs(
    report: CostReport,
    model: str = "program",
    passes: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
) -> Inspection:
    """Group a cost report by op and by layer."""
    path = frozenset(report.critical_path)
    everything = report.total
    count = len(report.rows)
    total = Row("total", count, "", everything.rounds, everything.online, everything.offline, 1.0)
    return Inspection(
        model=model,
        new=report.new,
        past=report.past,
        total=total,
        by_op=_group(report, path, lambda row: row.target, by_cost=True),
        by_layer=_group(report, path, lambda row: layer_of(row.module), by_cost=False),
        passes=[dict(entry) for entry in passes],
        facts=dict(facts or {}),
    )


def layer_of(module: str) -> str:
    """`model.layers.3.self_attn.q_proj` belongs to `model.layers.3`, `lm_head` to itself."""
    parts = module.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: position + 1])
    return module or "(model)"


def graph_text(program: RoleProgram) -> str:
    """The program as text, one line per instruction; stable, so that two can be compared."""
    lines = []
    for spec in program.inputs:
        shape = "x".join(map(str, spec.shape)) or "scalar"
        then = f" -> {spec.cache_output}" if spec.cache_output else ""
        lines.append(f"%{spec.name} = input : {spec.vis.value} {spec.dtype} {shape}{then}")
    for constant in program.constants:
        shape = "x".join(map(str, constant.shape)) or "scalar"
        lines.append(f"%{constant.name} = constant : {constant.vis.value} {constant.dtype} {shape}")
    for item in program.instructions:
        args = [_text(arg) for arg in item.args]
        args += [f"{key}={_text(arg)}" for key, arg in item.kwargs.items()]
        frac = f" f{item.frac}" if item.vis is Vis.SHARED else ""
        origin = "  # " + "  ".join(filter(None, (item.module, item.source)))
        lines.append(
            f"%{item.name} = {item.target}({', '.join(args)}) : {item.vis.value}{frac}"
            + (origin if origin.strip(" #") else "")
        )
    lines.append("return " + ", ".join(f"%{name}" for name in program.outputs))
    return "\n".join(lines) + "\n"


def readable(count: float, unit: str = "B") -> str:
    """Bytes in a unit that a person reads at a glance: 1,204 B, 3.4 MB."""
    for scale, prefix in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if abs(count) >= scale:
            return f"{count / (1000 if prefix == 'k' else scale):,.1f} {prefix}{unit}"
    return f"{count:,.0f} {unit}"


def _group(
    report: CostReport, path: frozenset[str], key: Callable[[CostRow], str], *, by_cost: bool
) -> list[Row]:
    groups: dict[str, list[CostRow]] = {}
    for row in report.rows:
        groups.setdefault(key(row), []).append(row)
    whole = report.total.online or 1
    rows = []
    for name, members in groups.items():
        online = sum(row.cost.online for row in members)
        rows.append(
            Row(
                key=name,
                count=len(members),
                vis="/".join(sorted({row.vis.value for row in members})),
                rounds=sum(row.cost.rounds for row in members if row.name in path),
                online=online,
                offline=sum(row.cost.offline for row in members),
                share=online / whole,
            )
        )
    return sorted(rows, key=lambda row: (-row.online, row.key)) if by_cost else rows


def _cost_cells(first: str, rows: Sequence[Row], *, vis: bool = True) -> list[list[str]]:
    known = ["visibility"] if vis else []
    head = [first, "count", *known, "rounds", "online", "offline", "share"]
    return [head] + [
        [
            row.key,
            f"{row.count:,}",
            *([row.vis] if vis else []),
            f"{row.rounds:,}",
            readable(row.online),
            readable(row.offline),
            f"{row.share:.1%}",
        ]
        for row in rows
    ]


def _text(value: Any) -> str:
    if isinstance(value, Ref):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return repr(value)
