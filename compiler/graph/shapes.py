"""Example values, with symbolic lengths, of calls and constants that passes add."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mergec.compiler.graph.ir import constant
from mergec.compiler.graph.visibility import visibility_of
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import Vis

ROWS = "rows"
"""The name of the number of positions at which a step reveals its result, where it is a length of
its own: meta["length"] of the node that computes it."""


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode of the graph's example values; None for a graph without any."""
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    mode: FakeTensorMode | None = detect_fake_mode(values)
    return mode


def evaluate(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode | None) -> Any:
    """The example value of a call, computed from those of its operands."""
    operands, options = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "mpc":
        # Symbolic lengths propagate through the ops of the reference, not through a custom op.
        target = REGISTRY[target._schema.name.partition("::")[2]].reference
    with mode or contextlib.nullcontext(), torch.no_grad():
        return target(*operands, **options)


def insert_call(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call before a node, with the same module path and source, value and visibility."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta = {key: before.meta.get(key, "") for key in ("module", "source")}
    node.meta["vis"] = visibility_of(node)
    node.meta["val"] = evaluate(target, node.args, node.kwargs, fake_mode(before.graph))
    return node


def insert_constant(
    graph_module: fx.GraphModule, before: fx.Node, name: str, value: torch.Tensor
) -> fx.Node:
    """Insert a public constant before a node; the pass must add it to `GraphInfo.constants`.

    A dotted name denotes an attribute of one of the model's modules.
    """
    path, _, leaf = name.rpartition(".")
    graph_module.get_submodule(path).register_buffer(leaf, value, persistent=False)
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(name)
    node.meta = {key: before.meta.get(key, "") for key in ("module", "source")}
    node.meta["vis"] = Vis.PUBLIC
    _constant(graph_module, node, fake_mode(before.graph))
    return node


def length(before: fx.Node, source: fx.Node, dim: int) -> Any:
    """A size of a node's value: a number, or a node that computes it at run time."""
    size = source.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    return insert_call(before, torch.ops.aten.sym_size.int, source, dim % source.meta["val"].dim())


def _constant(graph_module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode | None) -> None:
    value = constant(graph_module, node)
    known = node.meta.get("val")
    if value is None or mode is None or (isinstance(known, FakeTensor) and _alike(value, known)):
        return
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)


def _alike(value: Any, known: Any) -> bool:
    """Whether two example values are equivalent, so that the known one can be kept."""
    if isinstance(value, torch.Tensor) and isinstance(known, torch.Tensor):
        same_shape = list(map(str, value.shape)) == list(map(str, known.shape))
        return same_shape and value.dtype == known.dtype and value.device == known.device
    return known is not None and str(value) == str(known)
