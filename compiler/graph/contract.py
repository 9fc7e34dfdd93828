"""The contract of passes, checked after each one: inputs, outputs, no dead nodes, legal ops."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mergec.compiler.errors import InternalError
from mergec.compiler.graph.ir import aten, calls
from mergec.compiler.graph.verify import unlowerable
from mergec.compiler.text import describe
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import PADS, InputSpec

TOLERANCE = 1e-9
"""Relative to the largest value, in float64: passes may change the order in which sums round."""

ROUNDED = 1e-5
"""The same for a model with float32 weights, to which passes round the weights they compute."""

SAMPLES = ((5, 0), (1, 4))
"""New and past tokens of the steps that are compared: a prompt, and a token onto a cache."""

SOURCE = 6
"""Tokens of the source in both samples, of an encoder-decoder."""

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)

Values = list[dict[str, torch.Tensor]]


@dataclass
class _State:
    """A snapshot of a graph: the inputs that are used, and its faults."""

    inputs: set[str]
    dead: set[fx.Node]
    illegal: dict[fx.Node, str]


class Contract:
    """Compares a graph before and after a pass: call `begin` before each pass, `check` after it."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[InputSpec],
        constants: Mapping[str, Vis],
        tokens: Sequence[int] = (),
    ) -> None:
        """tokens: the input on which the graph runs in float64, if outputs are compared.

        inputs, constants: those of the graph; passes change these collections in place.
        """
        self.inputs, self.constants, self.tokens = inputs, constants, tokens
        weights = [name for name, vis in constants.items() if vis is Vis.SERVER]
        held = {operator.attrgetter(name)(graph_module).dtype for name in weights}
        self.tolerance = ROUNDED if torch.float32 in held else TOLERANCE
        load_all()
        self.content = self._content(graph_module)
        self.state = _state(graph_module)
        self.values: Values | None = None
        self.compare = False

    def begin(self, graph_module: fx.GraphModule, *, compare: bool) -> None:
        """Record the state before a pass; with `compare`, the graph's outputs must not change.

        That costs two runs of the graph, or one if the previous pass was compared too.
        """
        self.compare = compare and bool(self.tokens)
        if self.compare and self.values is None:
            self.values = self._run(graph_module)

    def check(self, graph_module: fx.GraphModule, *, sites: int, exact: bool, final: bool) -> None:
        """Raise InternalError if the pass that has just run broke the contract.

        final: whether no later pass converts ops into ops of the dialect.
        """
        before, self.content = self.content, self._content(graph_module)
        changed = self.content != before
        if not sites:
            if changed:
                raise InternalError("it reports no changed site, but it has changed the graph")
            return
        if not changed:
            many = f"{sites} changed site{'s' if sites > 1 else ''}"
            raise InternalError(f"it reports {many}, but it has not changed the graph")
        old, new = self.state, _state(graph_module)
        found = sum(node.op == "placeholder" for node in graph_module.graph.nodes)
        if found != len(self.inputs):
            raise InternalError(f"the graph has {found} inputs instead of {len(self.inputs)}")
        lost = sorted(old.inputs - new.inputs)
        if exact and lost:
            raise InternalError(f"it drops the input {lost[0]}: nothing depends on it any more")
        for node in _added(graph_module, old.dead, new.dead):
            raise InternalError(f"it leaves a dead node behind: {describe(node)}")
        for node in _added(graph_module, old.illegal, new.illegal) if final else ():
            raise InternalError(
                f"it leaves an op that cannot be lowered: {describe(node)}: {new.illegal[node]}"
            )
        values, self.values = self.values, None
        if self.compare and values is not None:
            self.values = self._run(graph_module)
            _compare(graph_module, values, self.values, self.tolerance)
        self.state = new

    def _content(self, graph_module: fx.GraphModule) -> tuple[Any, ...]:
        """Everything that a pass may change."""
        nodes = graph_module.graph.nodes
        calls = [(node, node.op, node.target, node.args, node.kwargs) for node in nodes]
        return calls, list(self.inputs), dict(self.constants)

    def _run(self, graph_module: fx.GraphModule) -> Values:
        """The value of every call by name, for each of the samples."""
        values: Values = []
        for new, past in SAMPLES:
            random = torch.Generator().manual_seed(new)
            given = []
            for spec in self.inputs:
                shape = spec.shape_of(new, past, SOURCE)
                if spec.name == PADS:
                    given.append(torch.zeros(shape, dtype=torch.int64))
                elif spec.vis is Vis.CLIENT:
                    ids = torch.tensor(list(self.tokens)[: shape[-1]])
                    given.append(ids.repeat(shape[-1])[: shape[-1]].reshape(shape))
                else:
                    given.append(torch.randn(shape, generator=random, dtype=torch.float64))
            recorder = Wide(graph_module)
            with torch.no_grad():
                recorder.run(*given)
            values.append(recorder.values)
        return values


class Wide(fx.Interpreter):
    """Runs a graph in float64 throughout, whatever type its weights have, and keeps all values.

    Some models cast to float32 and back on the way; passes remove such casts.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[str, torch.Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.double() if isinstance(value, torch.Tensor) and _narrow(value.dtype) else value

    def run_node(self, n: fx.Node) -> Any:
        if calls(n, *_CHECKS):
            return None
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op == "call_function":
            self.values[n.name] = result
        elif n.op == "output":
            self.values |= {f"output {i}": value for i, value in enumerate(result)}
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args = tuple(torch.float64 if _narrow(arg) else arg for arg in args)
        kwargs = {key: torch.float64 if _narrow(arg) else arg for key, arg in kwargs.items()}
        return super().call_function(target, args, kwargs)


def _narrow(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype in _NARROW


def _state(graph_module: fx.GraphModule) -> _State:
    nodes = list(graph_module.graph.nodes)
    idle = {node for node in nodes if not node.users and node.op != "output"}
    inputs = {node for node in nodes if node.op == "placeholder"}
    return _State(
        {node.meta.get("name", node.name) for node in inputs - idle},
        idle - inputs,
        unlowerable(graph_module),
    )


def _added(
    graph_module: fx.GraphModule, before: Collection[fx.Node], after: Collection[fx.Node]
) -> list[fx.Node]:
    """Nodes that are new in a collection, in order."""
    return [n for n in graph_module.graph.nodes if n in after and n not in before]


def _compare(graph_module: fx.GraphModule, before: Values, after: Values, tolerance: float) -> None:
    """If an output has changed, raise InternalError, which names the first node that changed."""
    for (new, past), old, now in zip(SAMPLES, before, after, strict=False):

        def differs(name: str, old: Any = old, now: Any = now) -> bool:
            return not _equal(old[name], now[name], tolerance)

        outputs = [name for name in old if name.startswith("output ")]
        changed = [name for name in outputs if name not in now or differs(name)]
        if not changed:
            continue
        first = next(
            (
                node
                for node in graph_module.graph.nodes
                if node.name in old and node.name in now and differs(node.name)
            ),
            None,
        )  # fmt: skip
        where = f"; the first node that differs: {describe(first)}" if first is not None else ""
        raise InternalError(
            f"it is not exact: {changed[0]} changes for {new} new tokens after {past}{where}"
        )


def _equal(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    finite = a[a.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)
