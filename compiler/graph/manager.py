"""The order of passes, and the manager that runs them and checks each one."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from mergec.compiler.errors import CompileError, InternalError
from mergec.compiler.graph.contract import Contract
from mergec.compiler.graph.rewriting import STAGES, GraphInfo, Pass, Skip
from mergec.runtime.core.errors import MergecError


@dataclass(frozen=True)
class PassReport:
    """What one pass changed.

    summary: what it does. sites: how many places it changed. nodes_before, nodes_after: number of
    nodes of the graph. skips: the places that it skipped.
    """

    name: str
    summary: str
    exact: bool
    sites: int
    nodes_before: int
    nodes_after: int
    seconds: float
    skips: tuple[Skip, ...] = field(default=())


def ordered(passes: Iterable[type[Pass]], known: Iterable[type[Pass]] = ()) -> list[type[Pass]]:
    """Sort by stage, then `after`, then name.

    `known` are passes that exist but need not run; `after` may name them. Raises CompileError if
    two passes have the same name, if passes wait for each other, or if one waits for a pass that
    does not exist or is of a later stage.
    """
    passes = list(passes)
    by_name: dict[str, type[Pass]] = {}
    for p in passes:
        if (other := by_name.setdefault(p.name(), p)) is not p:
            raise CompileError(
                f"two passes have the name {p.name()!r}: {_place(other)} and {_place(p)}; rename "
                "one of the classes, or leave it out of extra_passes"
            )
    check_after(passes, {**{p.name(): p for p in known}, **by_name})
    remaining = sorted(passes, key=lambda p: (STAGES.index(p.stage), p.name()))
    result: list[type[Pass]] = []
    done: set[str] = set()
    while remaining:
        for candidate in remaining:
            waits = {name for name in candidate.after if name in by_name} - done
            first = candidate.stage == remaining[0].stage
            if first and not waits:
                break
        else:
            names = ", ".join(p.name() for p in remaining)
            raise CompileError(f"passes wait for each other: {names}; shorten an `after` of theirs")
        remaining.remove(candidate)
        result.append(candidate)
        done.add(candidate.name())
    return result


def check_after(passes: Iterable[type[Pass]], known: Mapping[str, type[Pass]]) -> None:
    """Raise CompileError if an `after` names no pass, or one of a later stage."""
    for p in passes:
        for name in p.after:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else "correct or remove the name"
                raise CompileError(f"{_place(p)} waits for an unknown pass, {name!r}; {hint}")
            if STAGES.index(known[name].stage) > STAGES.index(p.stage):
                raise CompileError(
                    f"{_place(p)} waits for {name}, which is of a later stage, "
                    f"{known[name].stage!r}; change its stage or its `after`"
                )


def _place(kind: type[Pass]) -> str:
    return f"the pass {kind.__qualname__} ({kind.__module__})"


def run_passes(
    graph_module: fx.GraphModule,
    info: GraphInfo,
    passes: Sequence[type[Pass]],
    tokens: Sequence[int] = (),
    check: bool | None = False,
) -> list[PassReport]:
    """Run the passes in the given order with torch's PassManager; an error names the failing pass.

    Each pass must respect `compiler.graph.contract`. check: whether outputs on `tokens` are
    compared before and after an exact pass: True for each, False for none, None for those that are
    not built in.
    """
    reports: list[PassReport] = []
    contract = Contract(graph_module, info.inputs, info.constants, tokens)
    manager = PassManager(
        passes=[
            _Reporting(kind(info), reports, contract, _compared(kind, check)) for kind in passes
        ]
    )
    try:
        manager(graph_module)
    except Exception as error:
        if isinstance(error, MergecError):
            raise
        cause = error.__cause__ or error
        if isinstance(cause, CompileError):
            raise cause from error
        done = ", ".join(report.name for report in reports) or "none"
        failed = passes[len(reports)].name()
        raise InternalError(f"pass {failed} failed ({cause}); ran before it: {done}") from error
    return reports


def _compared(kind: type[Pass], check: bool | None) -> bool:
    return kind.exact and (not kind.built_in() if check is None else check)


class _Reporting(PassBase):
    """Wraps a pass to check it and to record what it changed."""

    def __init__(
        self, inner: Pass, reports: list[PassReport], contract: Contract, compared: bool
    ) -> None:
        self.inner = inner
        self.reports = reports
        self.contract = contract
        self.compared = compared
        self.__name__ = inner.name()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        known, start = set(graph_module.graph.nodes), time.perf_counter()
        self.contract.begin(graph_module, compare=self.compared)
        result = self.inner.call(graph_module)
        for node in graph_module.graph.nodes:
            if node not in known:
                node.meta["pass"] = self.inner.name()
        self.contract.check(
            graph_module,
            sites=self.inner.sites,
            exact=self.inner.exact,
            final=STAGES.index(self.inner.stage) > STAGES.index("dialect"),
        )
        self.reports.append(
            PassReport(
                self.inner.name(),
                self.inner.summary(),
                self.inner.exact,
                self.inner.sites,
                len(known),
                len(graph_module.graph.nodes),
                time.perf_counter() - start,
                self.inner.explained,
            )
        )
        return result
