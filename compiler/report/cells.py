"""The rows of an inspection as cells of text, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

from mergec.compiler.report.rows import PassRow, Row, ScheduleRow, StepRow
from mergec.compiler.report.text import readable


def cost_cells(first: str, rows: Sequence[Row], *, detail: bool = False) -> list[list[str]]:
    """Cost by op or by layer; `first` heads the first column, detail adds shapes and visibility."""
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


def schedule_cells(rows: Sequence[ScheduleRow]) -> list[list[str]]:
    """Rounds and bytes by the way of running the instructions."""
    body = [[row.way, f"{row.rounds:,}", readable(row.online)] for row in rows]
    return [["instructions", "rounds", "online"], *body]


def step_cells(rows: Sequence[StepRow]) -> list[list[str]]:
    """The total costs of other steps."""
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


def pass_cells(rows: Sequence[PassRow]) -> list[list[str]]:
    """What each pass changed; with rounds and bytes if savings were asked for."""
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
