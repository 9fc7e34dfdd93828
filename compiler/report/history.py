"""The history of a compile: the captured graph, what each pass changed, and what that saved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.backend.emit import value_types
from mergec.compiler.backend.lower import lower
from mergec.compiler.config import CompileConfig
from mergec.compiler.frontend.calibration import Sequences
from mergec.compiler.frontend.capture import Captured
from mergec.compiler.frontend.exclusive import exclusive
from mergec.compiler.graph.manager import PassReport
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.visibility import annotate_visibility
from mergec.compiler.pipeline import assemble, rewrite, to_dialect
from mergec.compiler.report.graph_view import GraphView
from mergec.compiler.report.rows import Saving
from mergec.compiler.selection import select
from mergec.compiler.text import assign_names, layer_of, length_symbols, node_lines
from mergec.runtime.core.errors import MergecError
from mergec.runtime.core.spec import Cost
from mergec.runtime.program.program import RoleProgram

_PLACE = re.compile(r"%[\w.]+")
"""A value's name in a line of text."""


@dataclass(frozen=True)
class Hunk:
    """A change that a pass made in the same way in each of `layers`.

    In the lines, `N` is the number of the layer, and `N-1` that of the previous layer.
    """

    layers: tuple[str, ...]
    removed: tuple[str, ...]
    added: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """What one pass did to the graph.

    rewired: how many other nodes only had an operand replaced.
    """

    name: str
    hunks: tuple[Hunk, ...]
    rewired: int


@dataclass(frozen=True)
class _Trial:
    name: str
    needed: str
    without: RoleProgram | None
    with_it: RoleProgram


class History:
    """Replays a compile pass by pass. Everything is computed on first use."""

    def __init__(self, captured: Captured, config: CompileConfig, sequences: Sequences) -> None:
        """captured: the graph before any pass; it is copied, not changed.

        config, sequences: the options and the calibration sequences of the compile.
        """
        self._captured = captured
        self._config = config
        self._sequences = sequences

    @cached_property
    @exclusive
    def before(self) -> GraphView:
        """The graph as captured, of ATen ops."""
        step = self._captured.copy()
        annotate_visibility(step.graph_module, step.inputs, step.constants)
        graph = step.graph_module.graph
        bits = self._config.fractional_bits
        program = lower(step.graph_module, step.inputs, step.tensors(), bits)["client"]
        types = value_types(step.graph_module, assign_names(graph), length_symbols(graph))
        return GraphView(program, types)

    @cached_property
    @exclusive
    def changes(self) -> list[Change]:
        """The changes of each pass that changed something, in the order in which they ran."""
        step = self._captured.copy()
        annotate_visibility(step.graph_module, step.inputs, step.constants)
        graph = step.graph_module.graph
        names = assign_names(graph)
        found = []
        for kind in select(self._config):
            lines = node_lines(graph, names)
            (report,) = self._rewrite(step, [kind])
            if report.sites:
                names = _keep_names(graph, names)
                found.append(_compare(kind.name(), lines, node_lines(graph, names)))
        return found

    def savings(self, new: int, past: int, source: int | None = None) -> list[Saving]:
        """What each pass saves in a step of `new` tokens after `past` ones (`RoleProgram.sizes`).

        Passes that changed nothing are left out. Each of the others takes one compile, without
        capture. Later calls with other lengths reuse these compiles.
        """
        bits, exact = self._config.fractional_bits, self._config.rounding == "exact"

        def cost(program: RoleProgram) -> Cost:
            return cost_report(program, new, past, bits, exact, source).total

        return [
            Saving(trial.name, trial.needed)
            if trial.without is None
            else Saving(
                trial.name,
                "",
                cost(trial.without),
                cost(trial.with_it),
                (len(trial.without.instructions), len(trial.with_it.instructions)),
            )
            for trial in self._trials
        ]

    @cached_property
    @exclusive
    def _trials(self) -> list[_Trial]:
        """Try to leave out each pass, from the last one to the first.

        If the model compiles without a pass, that pass stays out of the following trials. So each
        trial is the baseline of the next one, and the last trial runs only the needed passes.
        """
        order = select(self._config)
        step, snapshots = self._captured.copy(), []
        for position, kind in enumerate(order):
            before = step.copy()
            (report,) = self._rewrite(step, [kind])
            if report.sites:
                snapshots.append((position, before))
        program = self._program(step, [])
        left: set[type[Pass]] = set()
        trials = []
        for position, snapshot in reversed(snapshots):
            kind = order[position]
            rest = [later for later in order[position + 1 :] if later not in left]
            try:
                trial = self._program(snapshot, rest)
            except MergecError as error:
                trials.append(_Trial(kind.name(), str(error).splitlines()[0], None, program))
                continue
            trials.append(_Trial(kind.name(), "", trial, program))
            left.add(kind)
            program = trial
        return trials[::-1]

    def _program(self, step: Captured, rest: Sequence[type[Pass]]) -> RoleProgram:
        """The client's program for a graph on which the passes in `rest` have yet to run."""
        dialect = to_dialect(step, self._config, rest, self._sequences)
        return assemble(dialect, self._config)["client"]

    def _rewrite(self, step: Captured, passes: Sequence[type[Pass]]) -> list[PassReport]:
        return rewrite(step, self._config, passes, self._sequences)


def _keep_names(graph: fx.Graph, before: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """Names for a rewritten graph; nodes that survive keep theirs."""
    fresh = assign_names(graph)
    names = {node: before[node] for node in graph.nodes if node in before}
    taken = set(names.values())
    for node in graph.nodes:
        if node in names:
            continue
        name, count = fresh[node], 2
        while name in taken:
            name, count = f"{fresh[node]}.{count}", count + 1
        names[node] = name
        taken.add(name)
    return names


def _compare(name: str, before: dict[fx.Node, str], after: dict[fx.Node, str]) -> Change:
    """The lines removed and added, by layer; layers with the same changes share one hunk.

    A node that calls the same function on other operands is counted as rewired, not as changed.
    """
    removed: dict[str, list[str]] = {}
    added: dict[str, list[str]] = {}
    rewired = 0
    for node, line in before.items():
        if node not in after:
            removed.setdefault(_layer(node), []).append(line)
        elif _PLACE.sub("%", after[node]) != _PLACE.sub("%", line):
            removed.setdefault(_layer(node), []).append(line)
            added.setdefault(_layer(node), []).append(after[node])
        elif after[node] != line:
            rewired += 1
    for node, line in after.items():
        if node not in before:
            added.setdefault(_layer(node), []).append(line)
    places: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for layer in dict.fromkeys([*removed, *added]):
        key = (
            tuple(_relative(line, layer) for line in removed.get(layer, ())),
            tuple(_relative(line, layer) for line in added.get(layer, ())),
        )
        places.setdefault(key, []).append(layer)
    hunks = tuple(Hunk(tuple(layers), *lines) for lines, layers in places.items())
    return Change(name, hunks, rewired)


def _layer(node: fx.Node) -> str:
    return layer_of(node.meta.get("module", ""))


def _relative(line: str, layer: str) -> str:
    """The line with the layer's number as `N`, and other layers by their distance from it."""
    stem, _, number = layer.rpartition(".")
    if not number.isdecimal():
        return line

    def distance(found: re.Match[str]) -> str:
        away = int(found[2]) - int(number)
        return f"{found[1]}N{away:+d}" if away else f"{found[1]}N"

    return re.sub(rf"(\b{re.escape(stem)}\.|\bcache\.)(\d+)", distance, line)
