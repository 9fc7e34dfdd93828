"""What a pass is, how passes are found and ordered, and the manager that runs them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from compiler.contract import Contract
from compiler.errors import CompileError, InternalError
from compiler.ir import assign_names
from compiler.visibility import annotate_visibility
from runtime.errors import MergecError
from runtime.program import InputSpec
from runtime.spec import Vis

STAGES = ("canonicalize", "fuse", "approximate", "dialect", "optimize", "finish")
"""canonicalize: fewer spellings of the same thing. fuse: recognize ops of the dialect by their
pattern. approximate: put cheaper functions in their place, on request. dialect: what is left
becomes ops of the dialect. optimize: fewer or cheaper ops of the dialect. finish: after all."""

ENTRY_POINTS = "mergec.passes"
"""The group of entry points under which other packages offer passes."""


@dataclass
class GraphInfo:
    """What passes may know beside the graph; they may add constants.

    calibration: token sequences on which a lossy pass may observe the graph. reveal: what the
    client learns of a step, "logits" or "token".
    """

    inputs: list[InputSpec]
    constants: dict[str, Vis]
    calibration: Sequence[Sequence[int]] = ()
    reveal: str = "logits"


class Pass(PassBase):
    """One rewrite. A subclass in a file of this package is found and run by itself.

    stage, after: where in the order it runs; `after` holds names of passes of the same stage.
    exact: whether the graph computes the same function; a lossy pass runs on request only.
    """

    stage: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True

    def __init__(self, info: GraphInfo) -> None:
        self.info = info
        self.skips: list[tuple[fx.Node, str]] = []

    @classmethod
    def name(cls) -> str:
        """The name of its file; outside this package, that of the class in snake case."""
        package, _, file = cls.__module__.rpartition(".")
        if package == __package__:
            return file
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).strip("_").lower()

    @classmethod
    def summary(cls) -> str:
        """What it rewrites and why: the first paragraph of its docstring."""
        return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())

    def run(self, graph_module: fx.GraphModule) -> int:
        """Rewrite in place; gives the number of sites changed, 0 for an untouched graph."""
        raise NotImplementedError

    def skip(self, node: fx.Node, reason: str) -> None:
        """Record why a site that looked like the pattern was left alone."""
        self.skips.append((node, reason))

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run with visibilities up to date before and after; dead code is removed."""
        annotate_visibility(graph_module, self.info.inputs, self.info.constants)
        self.sites = self.run(graph_module)
        self.explained = self._explain(graph_module)
        if self.sites:
            graph_module.graph.eliminate_dead_code()
            self._drop_unused_constants(graph_module)
            graph_module.graph.lint()
            graph_module.recompile()
            annotate_visibility(graph_module, self.info.inputs, self.info.constants)
        return PassResult(graph_module, self.sites > 0)

    def _explain(self, graph_module: fx.GraphModule) -> tuple[Skip, ...]:
        """What was skipped, in words that a reader of the graph's text finds there."""
        names = assign_names(graph_module.graph) if self.skips else {}
        found = []
        for node, reason in self.skips:
            module, source = node.meta.get("module", ""), node.meta.get("source", "")
            found.append(Skip(names.get(node, node.name), module, source, reason))
        return tuple(found)

    def _drop_unused_constants(self, graph_module: fx.GraphModule) -> None:
        """A matrix and its folded copies would all be held until the end of the compilation."""
        used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
        for name in [name for name in self.info.constants if name not in used]:
            path, _, leaf = name.rpartition(".")
            delattr(graph_module.get_submodule(path), leaf)
            del self.info.constants[name]


@dataclass(frozen=True)
class Skip:
    """A node that looked like a pass's pattern, where it comes from, and why it was left alone."""

    node: str
    module: str
    source: str
    reason: str


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


def available() -> dict[str, type[Pass]]:
    """Every pass by name: those of this package, and those that other packages offer.

    A package offers a pass as an entry point of the group `mergec.passes`.
    """
    package = importlib.import_module("passes")
    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name == "base":
            continue
        contents = vars(importlib.import_module(f"passes.{module.name}")).values()
        for item in contents:
            if isinstance(item, type) and issubclass(item, Pass) and item is not Pass:
                found[item.name()] = item
    for point in entry_points(group=ENTRY_POINTS):
        kind = _load(point)
        if found.setdefault(kind.name(), kind) is not kind:
            raise CompileError(
                f"the entry point {point.value} of {ENTRY_POINTS} has the name of another pass, "
                f"{kind.name()!r}; rename its class"
            )
    return found


def _load(point: EntryPoint) -> type[Pass]:
    """The pass behind an entry point."""
    where = f"the entry point {point.value} of {ENTRY_POINTS}"
    try:
        kind = point.load()
    except Exception as error:
        raise CompileError(f"{where} cannot be loaded: {error}; repair its package") from error
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise CompileError(f"{where} is no subclass of passes.base.Pass; repair its package")
    return kind


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

    Each pass is held to `compiler.contract`; with `tokens`, also to the graph's outputs on them.
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
