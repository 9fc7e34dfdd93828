"""The base class of passes: one rewrite of a graph, where it runs, and what it knows."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from mergec.compiler.config import Sample
from mergec.compiler.errors import CompileError
from mergec.compiler.graph.visibility import annotate_visibility
from mergec.compiler.graph.weights import drop_unused_constants
from mergec.compiler.text import assign_names
from mergec.runtime.core.network import NETWORKS, Network
from mergec.runtime.core.spec import Vis
from mergec.runtime.program.program import InputSpec

STAGES = ("canonicalize", "fuse", "approximate", "dialect", "optimize", "finish")
"""canonicalize: one spelling for each operation. fuse: recognize patterns as ops of the dialect.
approximate: replace functions by cheaper ones, on request. dialect: turn the remaining calls into
ops of the dialect. optimize: fewer or cheaper ops of the dialect. finish: after everything else."""

PACKAGE = "mergec.passes"
"""The package of the built-in passes, which are named after their files."""


@dataclass
class GraphInfo:
    """What a pass knows in addition to the graph. A pass that adds a constant also adds it here.

    calibration: samples on which a lossy pass may observe the graph. reveal: what the
    client learns of a step, "logits" or "token". logit_noise: standard deviation of the noise that
    the server adds to logits. network: where the program will run, for passes that trade bytes for
    rounds. trained: constants of lossy passes by name, which training has determined; such a pass
    takes them instead of observing the graph. taken: the names of those that a pass has taken.
    """

    inputs: list[InputSpec]
    constants: dict[str, Vis]
    calibration: Sequence[Sample] = ()
    reveal: str = "logits"
    logit_noise: float = 0.0
    network: Network = NETWORKS["loopback"]
    trained: Mapping[str, torch.Tensor] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def take(self, name: str, shape: Sequence[int | None]) -> torch.Tensor | None:
        """The trained constant of this name; None if there is none.

        shape: what it must have; None for any size. Raises CompileError for another one.
        """
        value = self.trained.get(name)
        if value is None:
            return None
        if len(value.shape) != len(shape) or any(
            wanted not in (None, size) for size, wanted in zip(value.shape, shape, strict=True)
        ):
            said = "x".join("n" if size is None else str(size) for size in shape)
            raise CompileError(
                f"the trained constant {name} has the shape {'x'.join(map(str, value.shape))} "
                f"instead of {said}; adapt this model again"
            )
        self.taken.add(name)
        return value


class Pass(PassBase):
    """One rewrite. A subclass in a file of `passes/` is discovered automatically.

    Its docstring begins with a summary of one paragraph and shows the graph `Before:` and `After:`
    (see `compiler.graph.parse` for the text).

    stage, after: where in the order it runs; `after` names passes of the same stage or of an
    earlier one. exact: whether the graph still computes the same function; a lossy pass runs only
    on request. option: the option of a compile (`CompileConfig`) without which it does not run.

    A subclass that implements `run` without a stage of STAGES, or without a summary, raises
    CompileError where it is defined.

    Example:
        >>> class DropDoubleNeg(Pass):
        ...     \"\"\"Remove two negations in a row.
        ...
        ...     Before:
        ...         %x = input : shared 2x4
        ...         %1 = aten.neg.default(%x)
        ...         %2 = aten.neg.default(%1)
        ...         %3 = aten.relu.default(%2)
        ...     After:
        ...         %3 = aten.relu.default(%x)
        ...     \"\"\"
        ...
        ...     stage = "canonicalize"
        ...
        ...     def run(self, graph_module):
        ...         sites, neg = 0, torch.ops.aten.neg.default
        ...         for node in list(graph_module.graph.nodes):
        ...             if node.target is neg and getattr(node.args[0], "target", None) is neg:
        ...                 node.replace_all_uses_with(node.args[0].args[0])
        ...                 sites += 1
        ...         graph_module.graph.eliminate_dead_code()
        ...         return sites
        >>> DropDoubleNeg.name()
        'drop_double_neg'
    """

    stage: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True
    option: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.run is Pass.run:
            return  # A base class of passes.
        where = f"the pass {cls.__qualname__} ({cls.__module__})"
        if cls.built_in() and hasattr(sys.modules.get(cls.__module__), cls.__qualname__):
            raise CompileError(f"{where} is defined twice in its file; rename or remove one")
        stage = getattr(cls, "stage", None)
        if stage not in STAGES:
            lacks = "has no stage" if stage is None else f"has an unknown stage, {stage!r}"
            raise CompileError(f"{where} {lacks}; set `stage` to one of: {', '.join(STAGES)}")
        if not isinstance(cls.after, tuple):
            raise CompileError(f"{where} has {cls.after!r} as `after`; write a tuple of names")
        if not cls.summary():
            raise CompileError(f"{where} has no docstring; say in its first paragraph what it does")

    def __init__(self, info: GraphInfo) -> None:
        self.info = info
        self.skips: list[tuple[fx.Node, str]] = []

    @classmethod
    def built_in(cls) -> bool:
        """Whether it is a pass of mergec, and not of another package or of the user."""
        return cls.__module__.rpartition(".")[0] == PACKAGE

    @classmethod
    def name(cls) -> str:
        """The name of its file; outside of `passes/`, the class's name in snake case."""
        if cls.built_in():
            return cls.__module__.rpartition(".")[2]
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).strip("_").lower()

    @classmethod
    def summary(cls) -> str:
        """What it rewrites and why: the first paragraph of its docstring."""
        first = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
        return "" if first.startswith("Before:") else " ".join(first.split())

    def run(self, graph_module: fx.GraphModule) -> int:
        """Rewrite in place; returns the number of sites changed, 0 for an untouched graph."""
        raise NotImplementedError

    def skip(self, node: fx.Node, reason: str) -> None:
        """Record why a site that looked like the pattern was not rewritten.

        The reason may name another node by `%` and its fx name; the report shows its name in the
        graph's text.
        """
        self.skips.append((node, reason))

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run, with up-to-date visibilities before and after, and remove dead code."""
        annotate_visibility(graph_module, self.info.inputs, self.info.constants)
        self.sites = self.run(graph_module)
        self.explained = self._explain(graph_module)
        if self.sites:
            graph_module.graph.eliminate_dead_code()
            drop_unused_constants(graph_module, self.info.constants)
            graph_module.graph.lint()
            graph_module.recompile()
            annotate_visibility(graph_module, self.info.inputs, self.info.constants)
        return PassResult(graph_module, self.sites > 0)

    def _explain(self, graph_module: fx.GraphModule) -> tuple[Skip, ...]:
        """The skipped nodes under the names that they have in the graph's text."""
        names = assign_names(graph_module.graph) if self.skips else {}
        by_fx_name = {node.name: name for node, name in names.items()}
        found = []
        for node, reason in self.skips:
            reason = re.sub(r"%(\w+)", lambda m: f"%{by_fx_name.get(m[1], m[1])}", reason)
            module, source = node.meta.get("module", ""), node.meta.get("source", "")
            found.append(Skip(names.get(node, node.name), module, source, reason))
        return tuple(found)


@dataclass(frozen=True)
class Skip:
    """A node that looked like a pass's pattern: its name, its place, and why it was skipped."""

    node: str
    module: str
    source: str
    reason: str
