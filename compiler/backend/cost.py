"""Predicted cost of a program at given lengths, from the ops' own formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.spec import FRACTIONAL_BITS, Cost, Vis
from mergec.runtime.core.values import Held, Masked, Sent, Shared, Weight
from mergec.runtime.engine.executor import Executor, Planned
from mergec.runtime.program.program import FINISH, Phase, RoleProgram, phase_of


@dataclass(frozen=True)
class CostRow:
    """One instruction: what it is, what it gives, and what it costs."""

    name: str
    target: str
    module: str
    vis: Vis
    shape: tuple[int, ...]
    cost: Cost


@dataclass(frozen=True)
class CostReport:
    """A program's cost for `new` tokens after `past` ones.

    total.rounds is the critical path: instructions that do not depend on each other share rounds.
    critical_path names the instructions on one longest path, in order. takers: how many
    instructions take what an opening gives, for those that more than one does.
    """

    new: int
    past: int
    rows: list[CostRow]
    total: Cost
    critical_path: list[str]
    takers: dict[str, int]

    @property
    def serial(self) -> Cost:
        """What the step would take if no two instructions shared rounds."""
        return sum((row.cost for row in self.rows), Cost())

    @property
    def unshared(self) -> Cost:
        """The same if, besides, each instruction opened by itself what it takes."""
        again = (row.cost for row in self.rows for _ in range(1, self.takers.get(row.name, 1)))
        return sum(again, self.serial)


class CostWalker(Executor):
    """Walks the instructions on shapes, and asks each op's formula instead of its protocol."""

    def __init__(self, program: RoleProgram, fixed: int) -> None:
        super().__init__(program, ShapeContext(fixed=fixed), None)
        self.rows: list[CostRow] = []
        self.taken: list[str] = []
        """Names of opened values, once for each instruction that takes one as it is opened."""

    def setup(self) -> None:
        wanted = self._weight_bits()
        for spec in self.program.constants:
            dtype = getattr(torch, spec.dtype.removeprefix("torch."))
            if spec.vis is Vis.PUBLIC:
                self._held[spec.name] = self.program.tensors[spec.name]
                continue
            ghost = torch.empty(spec.shape, dtype=dtype, device="meta")
            if spec.vis is Vis.SHARED:
                self._share(spec.name, ghost, wanted)
                continue
            self._held[spec.name] = Held(spec.vis, ghost)
            if spec.name in wanted:
                self._weights[spec.name] = Weight(
                    ghost, ghost, ghost, self.context.fixed + wanted[spec.name]
                )

    def _start(self, planned: Planned, values: dict[str, Any]) -> Any:
        result = super()._start(planned, values)
        instruction = planned.instruction
        if planned.op is not None:
            cost = self.record.by_instruction.get(instruction.name, Cost())
            self.rows.append(
                CostRow(
                    instruction.name,
                    instruction.target,
                    instruction.module,
                    instruction.vis,
                    tuple(result.shape),
                    cost,
                )
            )
        return result

    def _shared(self, planned: Planned, bound: dict[str, Any]) -> Any:
        op, instruction = planned.op, planned.instruction
        if op is None:
            raise TypeError(f"{instruction.target} has no cost formula")
        cost = op.cost(*bound.values(), fixed=self.context.fixed)
        if op.result != "cache":
            opened = [name for name, value in bound.items() if isinstance(value, (Masked, Sent))]
            self.taken += [planned.argument(name).name for name in opened]
        self.record.by_instruction[instruction.name] = cost
        plain = op.reference(*map(_plain, bound.values()))
        shape = plain.shape
        ghost = torch.empty(shape, dtype=torch.int64, device="meta")
        if op.result == "cache":
            return type(bound[op.tensors[0]])(ghost, ghost, instruction.frac)
        if op.result == "masked":
            return Masked(ghost, ghost, instruction.frac)
        if op.result == "sent":
            return Sent(ghost, ghost, instruction.frac)
        if instruction.vis is Vis.CLIENT:
            return Held(Vis.CLIENT, ghost)
        return Shared(ghost, instruction.frac)


def _plain(value: Any) -> Any:
    """A real-valued meta tensor in place of any tensor."""
    if isinstance(value, Held):
        return value.value
    if isinstance(value, (Shared, Masked, Sent, Weight)):
        return torch.empty(value.shape, dtype=torch.float64, device="meta")
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def cost_report(
    program: RoleProgram, new: int, past: int, fixed: int = FRACTIONAL_BITS
) -> CostReport:
    """Predict rounds and bytes of one step; it takes no weights, so any role's program will do.

    new, past: as `runtime.session.generation.Session.step` takes them.
    """
    phase = phase_of(new, past)
    part = program.phase(phase)
    walker = CostWalker(program, fixed)
    walker.setup()
    lengths = (past, 0) if phase == FINISH else (new, past)
    walker.step(ghost_inputs(part, *lengths), part.outputs)
    costs = walker.record.by_instruction
    total = Cost()
    for cost in costs.values():
        total = total.beside(cost)
    path = _critical_path(walker, costs)
    rounds = sum(costs.get(name, Cost()).rounds for name in path)
    total = Cost(rounds, total.online, total.offline)
    return CostReport(new, past, walker.rows, total, path, _takers(walker))


def ghost_inputs(part: Phase | RoleProgram, new: int, past: int) -> dict[str, Any]:
    """Inputs of one step as shapes alone, in the forms that the program takes them in."""
    lengths = {"new": new, "past": past, "past+new": past + new}
    inputs: dict[str, Any] = {}
    for spec in part.inputs:
        shape = [lengths[size] if isinstance(size, str) else size for size in spec.shape]
        dtype = getattr(torch, spec.dtype.removeprefix("torch."))
        ghost = torch.empty(shape, dtype=dtype, device="meta")
        if spec.form == "share":
            words = torch.empty(shape, dtype=torch.int64, device="meta")
            inputs[spec.name] = Shared(words, spec.frac)
        elif spec.vis is Vis.SHARED:
            words = torch.empty(shape, dtype=torch.int64, device="meta")
            form = Sent if spec.form == "sent" else Masked
            inputs[spec.name] = form(words, words, spec.frac)
        else:
            inputs[spec.name] = Held(spec.vis, ghost)
    return inputs


def _takers(walker: CostWalker) -> dict[str, int]:
    """How often each opening is taken, however it is moved or cached before."""
    plan = {planned.instruction.name: planned for planned in walker.plan}
    found: Counter[str] = Counter()
    for name in walker.taken:
        sources, asked = set(), [name]
        while asked:
            planned = plan.get(asked.pop())
            if planned is None:
                continue
            if planned.op is None or planned.op.result == "cache":
                asked += planned.refs
            else:
                sources.add(planned.instruction.name)
        found.update(sources)
    return {name: count for name, count in found.items() if count > 1}


def _critical_path(walker: CostWalker, costs: dict[str, Cost]) -> list[str]:
    graph = nx.DiGraph()
    names = [planned.instruction.name for planned in walker.plan]
    graph.add_nodes_from(names)
    for name, needed in zip(names, walker.dependencies, strict=True):
        for index in needed:
            source = names[index]
            graph.add_edge(source, name, rounds=costs.get(source, Cost()).rounds)
        # A last edge carries the rounds of the instruction itself.
        graph.add_edge(name, (name, "done"), rounds=costs.get(name, Cost()).rounds)
    path = nx.dag_longest_path(graph, weight="rounds")
    return [name for name in path if isinstance(name, str)]
