"""The rows of an inspection's tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mergec.runtime.core.spec import Cost


@dataclass(frozen=True)
class Row:
    """The instructions of one op, or of one layer of the model.

    key: the op or the layer.
    count: how many instructions.
    shape: the most frequent shape of their results, and how many other shapes there are.
    vis: who knows their results.
    rounds: those on the critical path, so that the rows add up to the rounds of a step.
    online, offline: bytes between the two parties, and from the dealer.
    share: part of the step's online bytes, 0 to 1.
    """

    key: str
    count: int
    shape: str
    vis: str
    rounds: int
    online: int
    offline: int
    share: float

    def to_record(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class StepRow:
    """The total cost of a step of other lengths: a prompt, a token, the end of a session."""

    step: str
    new: int
    past: int
    rounds: int
    online: int
    offline: int

    def to_record(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class ScheduleRow:
    """Rounds and online bytes of a step under one way of running its instructions."""

    way: str
    rounds: int
    online: int

    def to_record(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Saving:
    """The cost of a step, and its number of instructions, without a pass and with it.

    In both programs all passes before it run, and after it only those that are needed.
    needed: why the model cannot be compiled without the pass. Then there is nothing to compare
    with, and the other fields are None.
    """

    name: str
    needed: str
    without: Cost | None = None
    with_it: Cost | None = None
    instructions: tuple[int, int] | None = None


@dataclass(frozen=True)
class PassRow:
    """What one pass changed, and what it saves.

    sites: how many places of the graph it changed.
    nodes_before, nodes_after: nodes of the graph.
    skips: node, module, source and reason of each site that it skipped.
    needed, without, with_it, instructions: see `Saving`; empty unless savings were asked for.
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
        """From an entry of `Manifest.passes`."""
        told = ("summary", "exact", "sites", "nodes_before", "nodes_after", "skips")
        row = cls(name=entry["pass"], **{key: entry[key] for key in told})
        if saving is None:
            return row
        return replace(row, **{k: v for k, v in vars(saving).items() if k != "name"})

    def to_record(self) -> dict[str, Any]:
        """The fields by name; skips as a number, costs and instructions as separate fields."""
        record = {key: getattr(self, key) for key in _PASS_FIELDS}
        record["skips"] = len(self.skips)
        before, after = self.instructions or (None, None)
        for name, cost, count in (("without", self.without, before), ("with", self.with_it, after)):
            for key in ("rounds", "online", "offline"):
                record[f"{name}_{key}"] = None if cost is None else getattr(cost, key)
            record[f"{name}_instructions"] = count
        return record


_PASS_FIELDS = ("name", "summary", "exact", "sites", "nodes_before", "nodes_after", "needed")
