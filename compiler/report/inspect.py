"""What a compiled program does and costs, as tables: by op, by layer, by pass."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergec.compiler.backend.cost import CostReport, CostRow
from mergec.compiler.errors import CompileError
from mergec.compiler.text import call_text, dtype_text, layer_of, literal, place_text
from mergec.runtime.core.spec import Cost, Vis
from mergec.runtime.program.program import InputSpec, Instruction, RoleProgram, TensorSpec

if TYPE_CHECKING:
    from mergec.compiler.backend.onnx_export import ValueType
    from mergec.compiler.report.history import Saving


@dataclass(frozen=True)
class Row:
    """Instructions of one kind, or of one place in the model.

    shape: the most frequent one of the results, and how many others there are. rounds: those on
    the critical path, so that the rows add up to the rounds of a step. share: of the step's online
    bytes.
    """

    key: str
    count: int
    shape: str
    vis: str
    rounds: int
    online: int
    offline: int
    share: float


@dataclass(frozen=True)
class StepRow:
    """What a step of other lengths costs in all: a prompt, a token, the end of a session."""

    step: str
    new: int
    past: int
    rounds: int
    online: int
    offline: int


@dataclass(frozen=True)
class ScheduleRow:
    """Rounds and online bytes of a step under one way of running its instructions."""

    way: str
    rounds: int
    online: int


@dataclass(frozen=True)
class PassRow:
    """What one pass did; the fields after `skips` only where its savings were asked for.

    skips: node, module, source and reason of each site that it left alone. needed: why the model
    cannot be compiled without it. without, with_it: what a step costs, and instructions: how many
    there are, before and after it was added to the passes before it and the needed ones after it.
    """

    name: str
    summary: str
    exact: bool
    sites: int
    nodes_before: int
    nodes_after: int
    skips: list[dict[str, str]]
    needed: str = ""
    without: Cost | None = None
    with_it: Cost | None = None
    instructions: tuple[int, int] | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any], saving: Saving | None = None) -> PassRow:
        """From a manifest's entry."""
        row = cls(name=entry["pass"], **{k: v for k, v in entry.items() if k != "pass"})
        if saving is None:
            return row
        return replace(row, **{k: v for k, v in vars(saving).items() if k != "name"})


@dataclass(frozen=True)
class WhyNot:
    """Where a pass did not fire, and for what reason."""

    name: str
    verdict: str
    skips: list[dict[str, str]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def to_markdown(self) -> str:
        table = [_markdown(self._cells())] if self.skips else []
        return "\n\n".join([f"**{self.name}** {self.verdict}", *table]) + "\n"

    def render(self) -> RenderableType:
        """For a terminal."""
        said = Text.assemble((self.name, "bold"), " ", self.verdict)
        return Group(said, _table("", self._cells())) if self.skips else said

    def _cells(self) -> list[list[str]]:
        keys = ("node", "module", "source", "reason")
        return [list(keys), *([skip[key] for key in keys] for skip in self.skips)]


@dataclass(frozen=True)
class Inspection:
    """The tables of one program at one step's lengths.

    schedule: rounds before and after sharing openings and rounds. steps: the totals of other
    steps. left_out: why other passes did not run.
    """

    model: str
    new: int
    past: int
    total: Row
    schedule: list[ScheduleRow]
    by_op: list[Row]
    by_layer: list[Row]
    steps: list[StepRow] = field(default_factory=list)
    passes: list[PassRow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def lossy(self) -> list[str]:
        """The passes that made the program compute another function than the model."""
        return [row.name for row in self.passes if row.sites and not row.exact]

    def why_not(self, name: str) -> WhyNot:
        """Why the pass of this name did not fire, or where it did not."""
        if name in self.left_out:
            return WhyNot(name, f"did not run: {self.left_out[name]}", [])
        found = [row for row in self.passes if row.name == name]
        if not found:
            known = sorted({*self.left_out, *(row.name for row in self.passes)})
            listed = ", ".join(known) or "none that this program tells of"
            raise CompileError(f"unknown pass {name!r}; there are: {listed}")
        (row,) = found
        changed = f"changed {row.sites:,} site{'s' if row.sites != 1 else ''}"
        if row.skips:
            return WhyNot(name, f"{changed} and left {len(row.skips):,} alone:", row.skips)
        if row.sites:
            return WhyNot(name, f"{changed}; no other looked like its pattern", [])
        return WhyNot(name, f"found no site that looks like its pattern: {row.summary}", [])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def to_markdown(self) -> str:
        facts = "\n".join(f"* {line}" for line in self._said())
        parts = [f"## {self.title()}", *([facts] if facts else [])]
        for heading, cells in self._tables():
            parts += [f"### {heading}", _markdown(cells)]
        return "\n\n".join([*parts, *self._notes()]) + "\n"

    def render(self) -> RenderableType:
        """For a terminal."""
        shown: list[RenderableType] = [Text(self.title(), "bold")]
        shown += [Text(f"  {line}", "yellow" if "lossy: " in line else "") for line in self._said()]
        shown += [_table(heading, cells) for heading, cells in self._tables()]
        return Group(*shown, *(Text(note) for note in self._notes()))

    def title(self) -> str:
        """One line: which program, which step."""
        return f"{self.model}: {self.step()}"

    def step(self) -> str:
        """Which step: its lengths."""
        if self.new == 0:
            return f"the last step, logits of {self.past} hidden states at once"
        return f"a step of {self.new} new after {self.past} cached tokens"

    def _said(self) -> Iterator[str]:
        for key, value in self.facts.items():
            if key != "lossy":
                yield f"{key.replace('_', ' ')}: {value}"
            elif value:
                yield f"lossy: computes another function than the model, by {', '.join(self.lossy)}"
            else:
                yield "exact: computes what the model computes"

    def _tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        yield "By op", _cost_cells("op", [*self.by_op, self.total], detail=True)
        yield "By layer", _cost_cells("layer", [*self.by_layer, self.total])
        yield "Rounds", _schedule_cells(self.schedule)
        if self.steps:
            yield "Steps", _step_cells(self.steps)
        fired = [row for row in self.passes if row.sites]
        if fired:
            yield "Passes", _pass_cells(fired)

    def _notes(self) -> Iterator[str]:
        idle = [row.name for row in self.passes if not row.sites]
        if idle:
            yield f"Ran and found nothing: {', '.join(idle)}."
        for reason in dict.fromkeys(self.left_out.values()):
            names = [name for name, said in self.left_out.items() if said == reason]
            yield f"Did not run: {', '.join(names)} ({reason})."


def inspect_costs(
    report: CostReport,
    model: str = "program",
    steps: Mapping[str, Mapping[str, int]] | None = None,
    passes: Sequence[PassRow] = (),
    left_out: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Inspection:
    """Group a cost report by op and by layer; `steps` are a manifest's costs of other steps."""
    path = frozenset(report.critical_path)
    everything = report.total
    count = len(report.rows)
    total = Row(
        "total", count, "", "", everything.rounds, everything.online, everything.offline, 1.0
    )
    return Inspection(
        model=model,
        new=report.new,
        past=report.past,
        total=total,
        schedule=_schedule(report),
        by_op=_group(report, path, lambda row: row.target, by_cost=True),
        by_layer=_group(report, path, lambda row: layer_of(row.module), by_cost=False),
        steps=[StepRow(name, **step) for name, step in (steps or {}).items()],
        passes=list(passes),
        left_out=dict(left_out or {}),
        facts=dict(facts or {}),
    )


def graph_text(program: RoleProgram, types: Mapping[str, ValueType] | None = None) -> str:
    """The program as text, one line per instruction; stable, so that two can be compared.

    `types` are those of results, where they are known.
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
    """An instruction's result, function, operands and visibility."""
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
        shapes = Counter(shape_text(row.shape) for row in members)
        (frequent, _), *others = shapes.most_common()
        rows.append(
            Row(
                key=name,
                count=len(members),
                shape=f"{frequent} +{len(others)}" if others else frequent,
                vis="/".join(sorted({row.vis.value for row in members})),
                rounds=sum(row.cost.rounds for row in members if row.name in path),
                online=online,
                offline=sum(row.cost.offline for row in members),
                share=online / whole,
            )
        )
    return sorted(rows, key=lambda row: (-row.online, row.key)) if by_cost else rows


def _cost_cells(first: str, rows: Sequence[Row], *, detail: bool = False) -> list[list[str]]:
    known = ["shape", "visibility"] if detail else []
    head = [first, "count", *known, "rounds", "online", "offline", "share"]
    return [head] + [
        [
            row.key,
            f"{row.count:,}",
            *([row.shape, row.vis] if detail else []),
            f"{row.rounds:,}",
            readable(row.online),
            readable(row.offline),
            f"{row.share:.1%}",
        ]
        for row in rows
    ]


def _schedule(report: CostReport) -> list[ScheduleRow]:
    ways = {
        "one instruction after the other, each opens what it takes": report.unshared,
        "one instruction after the other, each value is opened once": report.serial,
        "as run: what does not wait for each other shares rounds": report.total,
    }
    return [ScheduleRow(way, cost.rounds, cost.online) for way, cost in ways.items()]


def _schedule_cells(rows: Sequence[ScheduleRow]) -> list[list[str]]:
    body = [[row.way, f"{row.rounds:,}", readable(row.online)] for row in rows]
    return [["instructions", "rounds", "online"], *body]


def _step_cells(rows: Sequence[StepRow]) -> list[list[str]]:
    head = ["step", "new", "past", "rounds", "online", "offline"]
    return [head] + [
        [
            row.step,
            f"{row.new:,}",
            f"{row.past:,}",
            f"{row.rounds:,}",
            readable(row.online),
            readable(row.offline),
        ]
        for row in rows
    ]


def _pass_cells(rows: Sequence[PassRow]) -> list[list[str]]:
    priced = any(row.needed or row.without for row in rows)
    head = ["pass", "", "sites", "nodes", *(["rounds", "online"] if priced else [])]
    return [head] + [
        [
            row.name,
            "exact" if row.exact else "lossy",
            f"{row.sites:,}",
            _both(row.nodes_before, row.nodes_after),
            *(_saved(row) if priced else []),
        ]
        for row in rows
    ]


def _saved(row: PassRow) -> list[str]:
    if row.without is None or row.with_it is None:
        return ["needed", "needed"]
    online = [readable(cost.online) for cost in (row.without, row.with_it)]
    return [
        _both(row.without.rounds, row.with_it.rounds),
        " → ".join(online) if row.without.online != row.with_it.online else online[0],
    ]


def _both(before: int, after: int) -> str:
    return f"{before:,} → {after:,}" if before != after else f"{before:,}"


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    head, *body = cells
    numeric = [bool(body) and all(_numeric(row[i]) for row in body) for i in range(len(head))]
    rules = ["---:" if right else "---" for right in numeric]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rules)}|"]
    # A bar in a cell would begin another cell.
    rows = [[cell.replace("|", "\\|") for cell in row] for row in body]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _table(heading: str, cells: Sequence[Sequence[str]]) -> Table:
    head, *body = cells
    table = Table(
        title=heading, title_justify="left", header_style="bold", box=SIMPLE,
        pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for index, name in enumerate(head):
        # On a narrow terminal shapes and reasons give way, never a name or a figure.
        yields = name in ("shape", "reason")
        width = None if yields else max(len(row[index]) for row in [head, *body])
        right = index > 0 and all(_numeric(row[index]) for row in body)
        table.add_column(
            name, min_width=width, justify="right" if right else "left", no_wrap=not yields
        )
    for row in body:
        last = row is body[-1] and row[0] == "total"
        table.add_row(*(Text(cell) for cell in row), style="bold" if last else "")
    return table


def _numeric(cell: str) -> bool:
    """Whether a cell holds a figure, and so is aligned right."""
    return (cell[:1].isdigit() and "x" not in cell) or cell in ("needed", "")


def _text(value: Any) -> str:
    return literal(value, lambda ref: f"%{ref.name}")
