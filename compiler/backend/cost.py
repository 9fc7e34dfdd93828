"""Predicts the rounds and bytes of a step, from the ops' own cost formulas or their protocols."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import networkx as nx
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import FRACTIONAL_BITS, Cost, Vis
from mergec.runtime.core.values import Held, Masked, Sent, Shared, Weight, Wide
from mergec.runtime.engine.functions import Call, evaluate
from mergec.runtime.engine.packing import online_bytes
from mergec.runtime.engine.plan import Plan, Planned
from mergec.runtime.engine.rehearsal import Rehearsal, drive, ghost_inputs
from mergec.runtime.engine.weights import without_data
from mergec.runtime.program.program import Instruction, RoleProgram, phase_of
from mergec.runtime.protocols.weights import Constant


@dataclass(frozen=True)
class CostRow:
    """One call of a dialect op: its target, the visibility and shape of its result, its cost."""

    name: str
    target: str
    module: str
    vis: Vis
    shape: tuple[int, ...]
    cost: Cost


@dataclass(frozen=True)
class CostReport:
    """The cost of a step of `new` tokens after `past` ones.

    rows: one per call of a dialect op, in program order.
    total: bytes add up; rounds are those of the critical path, because instructions that do not
    depend on each other share rounds.
    critical_path: the instructions on one longest path, in order.
    takers: for each opened value that more than one instruction uses, how many do.
    """

    new: int
    past: int
    rows: list[CostRow]
    total: Cost
    critical_path: list[str]
    takers: dict[str, int]

    @property
    def serial(self) -> Cost:
        """The cost of the step if no two instructions shared rounds."""
        return sum((row.cost for row in self.rows), Cost())

    @property
    def unshared(self) -> Cost:
        """The same if, in addition, each instruction opened its own operands."""
        again = (row.cost for row in self.rows for _ in range(1, self.takers.get(row.name, 1)))
        return sum(again, self.serial)


@dataclass(frozen=True)
class Walked:
    """An instruction as `walk` visited it.

    bound: the arguments by parameter name if nobody can compute it alone, else None; secret values
    have shapes and fractional bits, but no data. result: likewise.
    """

    planned: Planned
    bound: dict[str, Any] | None
    result: Any


def walk(
    plan: Plan, fixed: int, inputs: Mapping[str, Any], outputs: Collection[str]
) -> Iterator[Walked]:
    """Every instruction that leads from `inputs` to `outputs`, run on shapes, in program order.

    fixed: the program's fractional bits. inputs: from `ghost_inputs`.
    """
    context = ShapeContext(fixed=fixed)
    values, weights = _constants(plan, fixed)
    values |= inputs
    for position in plan.active(inputs, outputs):
        planned = plan.steps[position]
        operands = [values[name] for name in planned.refs]
        result = evaluate(context, planned, operands, weights)
        bound = None
        if isinstance(result, Call):
            bound = result.bound
            result = _result(result, planned.instruction)
        values[planned.name] = result
        yield Walked(planned, bound, result)


def _constants(plan: Plan, fixed: int) -> tuple[dict[str, Any], dict[str, Constant]]:
    """The constants by name, only public ones with data; and those under static masks."""
    held: dict[str, Any] = {}
    weights: dict[str, Constant] = {}
    for spec in plan.program.constants:
        ghost, bits = without_data(spec), plan.weight_bits.get(spec.name)
        if spec.vis is Vis.PUBLIC:
            held[spec.name] = plan.program.tensors[spec.name]
        elif spec.vis is not Vis.SHARED:
            held[spec.name] = Held(spec.vis, ghost)
            if bits is not None:
                weights[spec.name] = Weight(ghost, ghost, ghost, fixed + bits)
        elif bits is None:
            held[spec.name] = Shared(_words(spec.shape), fixed)
        else:
            words = _words(spec.shape)
            held[spec.name] = weights[spec.name] = Masked(words, words, fixed + bits)
    return held, weights


def _words(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _result(call: Call, instruction: Instruction) -> Any:
    """What the protocol of an op would return, as a shape."""
    op, bound = call.op, call.bound
    words = _words(_shape((op, *map(_plain, bound.values()))))
    if op.result == "cache":
        return type(bound[op.tensors[0]])(words, words, instruction.frac)
    if op.result == "masked":
        return Masked(words, words, instruction.frac)
    if op.result == "sent":
        return Sent(words, words, instruction.frac)
    if instruction.vis is Vis.CLIENT:
        return Held(Vis.CLIENT, words)
    if op.returns_wide(bound):
        return Wide(words, words, instruction.frac)
    return Shared(words, instruction.frac)


@dataclass(frozen=True)
class _Plain:
    """A real-valued tensor without data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _plain(value: Any) -> Any:
    """What a reference gets for an argument: for each tensor only what its shape follows from."""
    if isinstance(value, Held):
        value = value.value
    if isinstance(value, torch.Tensor):
        # A party may hold float32, which no function of torch takes beside float64.
        real = value.is_floating_point()
        return _Plain(tuple(value.shape), torch.float64 if real else value.dtype)
    if isinstance(value, (Shared, Wide, Masked, Sent, Weight)):
        return _Plain(tuple(value.shape), torch.float64)
    return tuple(map(_plain, value)) if isinstance(value, list) else value


@lru_cache(maxsize=4096)
def _shape(call: tuple[Any, ...]) -> torch.Size:
    """The shape of a call's result; the op first. Layers are alike, and walks repeat each other."""
    op, *arguments = call
    shape: torch.Size = op.reference(*map(_given, arguments)).shape
    return shape


def _given(value: Any) -> Any:
    if isinstance(value, _Plain):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return list(map(_given, value)) if isinstance(value, tuple) else value


def call_cost(op: type[Op], bound: Mapping[str, Any], fixed: int, exact: bool) -> Cost:
    """Rounds and bytes of a call whose operands have shapes alone.

    The ops' formulas are those of public rounding. With exact rounding the protocol itself runs on
    the shapes, and its messages are counted.
    """
    if not exact:
        return op.cost(*bound.values(), fixed=fixed)
    context = ShapeContext(fixed=fixed, exact=True)
    rounds, _ = drive(context, op.protocol(context, *bound.values()))
    online = sum(online_bytes(message) for messages in rounds for message in messages)
    return Cost(len(rounds), online, sum(context.dealt.values()))


def dealt_bytes(
    program: RoleProgram,
    new: int,
    past: int,
    fixed: int | None = None,
    exact: bool | None = None,
    source: int | None = None,
) -> dict[str, int]:
    """Bytes that a dealer sends for one step, by role; their sum is `Cost.offline`.

    The program of any role works. new, past, fixed, exact, source: see `cost_report`.
    """
    arithmetic = program.manifest.arithmetic
    given = {"fixed": fixed, "exact": exact}
    arithmetic |= {key: value for key, value in given.items() if value is not None}
    total = {"client": 0, "server": 0}
    for part in Rehearsal(program, arithmetic=arithmetic).parts(new, past, source=source):
        for role in total:
            total[role] += part.dealt[role]
    return total


def cost_report(
    program: RoleProgram,
    new: int,
    past: int,
    fixed: int = FRACTIONAL_BITS,
    exact: bool | None = None,
    source: int | None = None,
) -> CostReport:
    """Predict the rounds and bytes of one step (`call_cost`).

    It reads no weights, so the program of any role works. new, past: tokens of the step and before
    it, as in `runtime.session.generation.Session.step`. fixed: the program's fractional bits.
    exact: whether roundings are exact; by default what the program's manifest says. source: see
    `RoleProgram.sizes`.
    """
    exact = program.manifest.rounding == "exact" if exact is None else exact
    plan = Plan(program)
    part = program.phase(phase_of(new, past))
    lengths = program.sizes(new, past, source)
    rows: list[CostRow] = []
    costs: dict[str, Cost] = {}
    taken: list[str] = []
    for walked in walk(plan, fixed, ghost_inputs(part, *lengths), part.outputs):
        planned, bound, item = walked.planned, walked.bound, walked.planned.instruction
        if planned.op is None:
            continue
        if bound is not None:
            costs[item.name] = call_cost(planned.op, bound, fixed, exact)
            if planned.op.result != "cache":
                opened = [key for key, value in bound.items() if isinstance(value, (Masked, Sent))]
                taken += [planned.argument(key).name for key in opened]
        cost, shape = costs.get(item.name, Cost()), tuple(walked.result.shape)
        rows.append(CostRow(item.name, item.target, item.module, item.vis, shape, cost))
    total = Cost()
    for cost in costs.values():
        total = total.beside(cost)
    path = _critical_path(plan, costs)
    rounds = sum(costs.get(name, Cost()).rounds for name in path)
    total = Cost(rounds, total.online, total.offline)
    return CostReport(new, past, rows, total, path, _takers(plan, taken))


def _takers(plan: Plan, taken: Sequence[str]) -> dict[str, int]:
    """How many instructions use each opened value, traced through moves and caches."""
    steps = {planned.name: planned for planned in plan.steps}
    found: Counter[str] = Counter()
    for name in taken:
        sources, asked = set(), [name]
        while asked:
            planned = steps.get(asked.pop())
            if planned is None:
                continue
            if planned.op is None or planned.op.result == "cache":
                asked += planned.refs
            else:
                sources.add(planned.name)
        found.update(sources)
    return {name: count for name, count in found.items() if count > 1}


def _critical_path(plan: Plan, costs: Mapping[str, Cost]) -> list[str]:
    graph = nx.DiGraph()
    names = [planned.name for planned in plan.steps]
    graph.add_nodes_from(names)
    for name, positions in zip(names, plan.dependencies, strict=True):
        for position in positions:
            source = names[position]
            graph.add_edge(source, name, rounds=costs.get(source, Cost()).rounds)
        # A last edge carries the rounds of the instruction itself.
        graph.add_edge(name, (name, "done"), rounds=costs.get(name, Cost()).rounds)
    path = nx.dag_longest_path(graph, weight="rounds")
    return [name for name in path if isinstance(name, str)]
