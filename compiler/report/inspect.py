"""What a compiled program does and costs: by op, by layer, by pass."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from mergec.compiler.backend.cost import CostReport, CostRow
from mergec.compiler.errors import CompileError
from mergec.compiler.report.cells import cost_cells, pass_cells, schedule_cells, step_cells
from mergec.compiler.report.rows import PassRow, Row, ScheduleRow, StepRow
from mergec.compiler.report.tables import html, markdown, table
from mergec.compiler.report.text import shape_text
from mergec.compiler.text import layer_of
from mergec.runtime.program.manifest import STEP


@dataclass(frozen=True)
class WhyNot:
    """The sites that a pass skipped, and why."""

    name: str
    verdict: str
    skips: list[dict[str, str]]

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self), indent=1)

    def to_markdown(self) -> str:
        """The verdict, and the sites as a table."""
        listed = [markdown(self._cells())] if self.skips else []
        return "\n\n".join([f"**{self.name}** {self.verdict}", *listed]) + "\n"

    def render(self) -> RenderableType:
        """For a terminal."""
        said = Text.assemble((self.name, "bold"), " ", self.verdict)
        # Not a table: its columns would leave no room for reasons where lines are short.
        places = ("node", "module", "source")
        sites = [
            (Text(", ".join(filter(None, (skip[key] for key in places)))), Text(skip["reason"]))
            for skip in self.skips
        ]
        return Group(
            said, *(part for at, why in sites for part in (at, Padding(why, (0, 0, 0, 4))))
        )

    def _repr_html_(self) -> str:
        """For a notebook."""
        return html(self.render())

    def _cells(self) -> list[list[str]]:
        keys = ("node", "module", "source", "reason")
        return [list(keys), *([skip[key] for key in keys] for skip in self.skips)]


@dataclass(frozen=True)
class Inspection:
    """The cost of one step of a program, and what each pass did; `Program.inspect` makes one.

    model: the program's name.
    new, past: tokens of the step and before it.
    total, by_op, by_layer: rounds and bytes of the step.
    schedule: rounds and bytes before and after instructions share openings and rounds.
    steps: the totals of other steps.
    passes: what each pass did, in the order in which they ran.
    left_out: why each other pass did not run, by name.
    facts: options and limits of the program, by name.

    In a notebook it shows its tables. As a data frame:

    >>> pandas.DataFrame(program.inspect().to_records("layer"))  # doctest: +SKIP
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
        """The passes that made the program compute a different function than the model."""
        return [row.name for row in self.passes if row.sites and not row.exact]

    def why_not(self, name: str) -> WhyNot:
        """Why the pass of this name changed nothing, or which sites it skipped.

        Raises CompileError, with the known names, if there is no such pass.
        """
        if name in self.left_out:
            return WhyNot(name, f"did not run: {self.left_out[name]}", [])
        found = [row for row in self.passes if row.name == name]
        if not found:
            known = sorted({*self.left_out, *(row.name for row in self.passes)})
            listed = ", ".join(known) or "none that this program lists"
            raise CompileError(f"unknown pass {name!r}; there are: {listed}")
        (row,) = found
        changed = f"changed {row.sites:,} site{'s' if row.sites != 1 else ''}"
        if row.skips:
            return WhyNot(name, f"{changed} and skipped {len(row.skips):,}:", row.skips)
        if row.sites:
            return WhyNot(name, f"{changed}; no other looked like its pattern", [])
        return WhyNot(name, f"found no site that looks like its pattern: {row.summary}", [])

    def to_json(self) -> str:
        """All fields as JSON; bytes are plain numbers."""
        return json.dumps(asdict(self), indent=1)

    def to_records(self, table: str = "op") -> list[dict[str, Any]]:
        """One table as flat dictionaries with the same keys, one per row, ready for pandas.

        table: "op", "layer", "schedule", "step" or "pass". Every record begins with `model`, `new`
        and `past`, so that the records of several inspections can be put into one frame. `online`
        and `offline` are bytes; `share` is the part of the step's online bytes, 0 to 1. In "step"
        `new` and `past` are the lengths of that step. In "pass" the keys `without_rounds`,
        `with_rounds` and so on are the step's cost without and with the pass; None unless savings
        were asked for.

        Raises CompileError if there is no such table.
        """
        tables: dict[str, Sequence[Any]] = {
            "op": self.by_op,
            "layer": self.by_layer,
            "schedule": self.schedule,
            "step": self.steps,
            "pass": self.passes,
        }
        if table not in tables:
            raise CompileError(f"unknown table {table!r}; there are: {', '.join(tables)}")
        step = {"model": self.model, "new": self.new, "past": self.past}
        return [step | row.to_record() for row in tables[table]]

    def to_markdown(self) -> str:
        """The tables as Markdown."""
        facts = "\n".join(f"* {line}" for line in self._said())
        parts = [f"## {self.title()}", *([facts] if facts else [])]
        for heading, cells in self._tables():
            parts += [f"### {heading}", markdown(cells)]
        return "\n\n".join([*parts, *self._notes()]) + "\n"

    def render(self) -> RenderableType:
        """For a terminal."""
        shown: list[RenderableType] = [Text(self.title(), "bold")]
        shown += [Text(f"  {line}", "yellow" if "lossy: " in line else "") for line in self._said()]
        shown += [table(heading, cells) for heading, cells in self._tables()]
        return Group(*shown, *(Text(note) for note in self._notes()))

    def _repr_html_(self) -> str:
        """For a notebook."""
        return html(self.render())

    def title(self) -> str:
        """One line: which program, which step."""
        return f"{self.model}: {self.step()}"

    def step(self) -> str:
        """Which step: its lengths."""
        if self.new == 0:
            return f"the last step, logits of {self.past} hidden states together"
        return f"a step of {self.new} new after {self.past} cached tokens"

    def _said(self) -> Iterator[str]:
        for key, value in self.facts.items():
            if isinstance(value, Mapping):
                parts = ", ".join(f"{name.replace('_', ' ')} {n:g} s" for name, n in value.items())
                yield f"{key.replace('_', ' ')}: {parts}"
            elif key != "lossy":
                yield f"{key.replace('_', ' ')}: {value}"
            elif value:
                yield f"lossy: does not compute the model's function, by {', '.join(self.lossy)}"
            else:
                yield "exact: computes what the model computes"

    def _tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        yield "By op", cost_cells("op", [*self.by_op, self.total], detail=True)
        yield "By layer", cost_cells("layer", [*self.by_layer, self.total])
        yield "Rounds", schedule_cells(self.schedule)
        if self.steps:
            yield "Steps", step_cells(self.steps)
        fired = [row for row in self.passes if row.sites]
        if fired:
            yield "Passes", pass_cells(fired)

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
    """Group a cost report by op and by layer.

    steps: the costs of other steps, as in `Manifest.cost`. The other arguments become fields.
    """
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
        steps=[
            StepRow(name, **{key: step[key] for key in STEP})
            for name, step in (steps or {}).items()
        ],
        passes=list(passes),
        left_out=dict(left_out or {}),
        facts=dict(facts or {}),
    )


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


def _schedule(report: CostReport) -> list[ScheduleRow]:
    ways = {
        "one instruction after the other, each opens its own operands": report.unshared,
        "one instruction after the other, each value is opened once": report.serial,
        "as run: independent instructions share rounds": report.total,
    }
    return [ScheduleRow(way, cost.rounds, cost.online) for way, cost in ways.items()]
