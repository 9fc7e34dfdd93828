"""What a pass is: one rewrite of a graph, where it runs, and what it may know."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from mergec.compiler.graph.visibility import annotate_visibility
from mergec.compiler.text import assign_names
from mergec.runtime.core.spec import Vis
from mergec.runtime.program.program import InputSpec

STAGES = ("canonicalize", "fuse", "approximate", "dialect", "optimize", "finish")
"""canonicalize: fewer spellings of the same thing. fuse: recognize ops of the dialect by their
pattern. approximate: put cheaper functions in their place, on request. dialect: what is left
becomes ops of the dialect. optimize: fewer or cheaper ops of the dialect. finish: after all."""

PACKAGE = "mergec.passes"
"""The package of our own passes, which are named after their files."""


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
        if package == PACKAGE:
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
