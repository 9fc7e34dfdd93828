"""Helpers to read and to change the nodes of a graph.

Keys of node.meta: "val", the example value (a fake tensor with symbolic sizes); "module" and
"source", where the node comes from in the model; "pass", the pass that made it; "vis", who knows
the value; "range", its smallest and largest number in calibration, and "columns", those of each
column of a residual stream, beside the keys that `Op.measure` sets; "form" and "frac", how a shared
value is held (see `compiler.backend.legalize`);
"label", the name that it has in a parsed text.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from mergec.compiler.text import bind as bind
from mergec.compiler.text import op_of as op_of
from mergec.runtime.core.spec import Vis

aten = torch.ops.aten


def calls(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of these overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def absmax(node: fx.Node) -> float:
    """How large the node's value got in calibration; 0 if that is unknown."""
    least, most = node.meta.get("range", (0.0, 0.0))
    return max(-least, most)


def is_public(node: Any) -> bool:
    """Whether an argument is known to all: a literal, or a node of public visibility."""
    return not isinstance(node, fx.Node) or node.meta.get("vis") is Vis.PUBLIC


def is_shared(node: Any) -> bool:
    """Whether an argument is a node that nobody knows in the clear."""
    return isinstance(node, fx.Node) and node.meta.get("vis") is Vis.SHARED


def rank(node: fx.Node) -> int:
    """Number of dimensions of the node's value."""
    return len(node.meta["val"].shape)


def last_dim(node: fx.Node, dim: int) -> bool:
    """Whether `dim` is the node's last dimension."""
    return dim in (-1, rank(node) - 1)


def ancestors(*nodes: fx.Node, stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """All that nodes are computed from, and they themselves; not beyond those of `stop`."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in stop else node.all_input_nodes
    return found


def replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Replace a node by a call with the same users and meta. The old node stays, dead."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    return new


def insert(before: fx.Node, target: Any, args: tuple[Any, ...], val: Any, vis: Vis) -> fx.Node:
    """Insert a node before another one, with the same place in the model."""
    with before.graph.inserting_before(before):
        new = before.graph.call_function(target, args)
    new.meta = {key: before.meta.get(key, "") for key in ("module", "source")}
    new.meta |= {"val": val, "vis": vis}
    return new


def constant(graph_module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor behind a get_attr node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, torch.Tensor) else None


def add_constant(
    before: fx.Node, constants: dict[str, Vis], name: str, value: torch.Tensor, vis: Vis
) -> fx.Node:
    """Add a constant to the graph, read before a node; `name` may be a path of modules."""
    module: Any = before.graph.owning_module
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    module.register_buffer(leaf, value)
    constants[name] = vis
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(name)
    node.meta = {key: before.meta.get(key, "") for key in ("module", "source")}
    node.meta |= {"val": value.to("meta"), "vis": vis}
    return node
