"""The order of passes, and the manager that runs them and checks each one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
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
    """What one pass did.

    summary: what it does. sites: how many it changed. nodes_before, nodes_after: of the graph.
    skips: what it left alone.
    """

    name: str
    summary: str
    exact: bool
    sites: int
    nodes_before: int
    nodes_after: int
    seconds: float
    skips: tuple[Skip, ...] = field(default=())


def ordered(passes: Iterable[type[Pass]]) -> list[type[Pass]]:
    """By stage, then `after`, then name.

    Raises InternalError on a cycle, an unknown stage, or a wait for a pass of a later stage.
    """
    passes = list(passes)
    stage = {p.name(): p.stage for p in passes}
    for p in passes:
        if p.stage not in STAGES:
            known = ", ".join(STAGES)
            raise InternalError(f"pass {p.name()} has stage {p.stage!r}; there are: {known}")
        late = [n for n in p.after if STAGES.index(stage.get(n, p.stage)) > STAGES.index(p.stage)]
        if late:
            raise InternalError(f"pass {p.name()} waits for {late[0]}, which is of a later stage")
    remaining = sorted(passes, key=lambda p: (STAGES.index(p.stage), p.name()))
    names = {p.name() for p in remaining}
    result: list[type[Pass]] = []
    done: set[str] = set()
    while remaining:
        for candidate in remaining:
            waits = {name for name in candidate.after if name in names} - done
            first = candidate.stage == remaining[0].stage
            if first and not waits:
                break
        else:
            raise InternalError(f"passes wait for each other: {[p.name() for p in remaining]}")
        remaining.remove(candidate)
        result.append(candidate)
        done.add(candidate.name())
    return result


def run_passes(
    graph_module: fx.GraphModule,
    info: GraphInfo,
    passes: Sequence[type[Pass]],
    tokens: Sequence[int] = (),
) -> list[PassReport]:
    """Run the passes in the given order with torch's PassManager; names the one that fails.

    Each pass is held to `compiler.graph.contract`; with `tokens`, also to the outputs on them.
    """
    reports: list[PassReport] = []
    contract = Contract(graph_module, info.inputs, info.constants, tokens)
    manager = PassManager(passes=[_Reporting(kind(info), reports, contract) for kind in passes])
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


class _Reporting(PassBase):
    """Wraps a pass to note what it did."""

    def __init__(self, inner: Pass, reports: list[PassReport], contract: Contract) -> None:
        self.inner = inner
        self.reports = reports
        self.contract = contract
        self.__name__ = inner.name()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        known, start = set(graph_module.graph.nodes), time.perf_counter()
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
