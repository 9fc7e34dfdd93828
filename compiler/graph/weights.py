"""Constants of a graph: their users, and new constants computed from them at compile time."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import fx

from mergec.compiler.errors import InternalError
from mergec.compiler.graph.ir import calls, constant, op_of
from mergec.compiler.graph.shapes import insert_constant
from mergec.runtime.core.memory import release_freed_memory
from mergec.runtime.core.spec import Vis

_DERIVED = re.compile(r"(_turned)?(_folded(_\d+)?)?$")
_LARGE = 1 << 18
"""Elements of a matrix that is worth a call to the C library."""

_EXACT = (torch.float32, torch.float64)


def uses(graph_module: fx.GraphModule, weight: fx.Node) -> list[fx.Node]:
    """Every node that uses this constant, through any get_attr node (tied weights have two)."""
    graph = graph_module.graph
    named = [n for n in graph.nodes if n.op == "get_attr" and n.target == weight.target]
    return [user for node in named for user in node.users]


def drop_unused_constants(
    graph_module: fx.GraphModule, constants: MutableMapping[str, Vis]
) -> None:
    """Otherwise a matrix and its folded copies would stay in memory until the compile ends.

    constants: visibilities by name, from which those of unused constants are removed as well.
    """
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    _drop(graph_module, [name for name in constants if name not in used], constants)


def _drop(
    graph_module: fx.GraphModule, names: Iterable[str], constants: MutableMapping[str, Vis]
) -> None:
    for name in names:
        path, _, leaf = name.rpartition(".")
        delattr(graph_module.get_submodule(path), leaf)
        del constants[name]


def drop_replaced(
    graph_module: fx.GraphModule, node: fx.Node, constants: MutableMapping[str, Vis]
) -> None:
    """Erase a call that has no users, and its constants that nothing else uses.

    A pass that replaces many matrices by new ones would otherwise hold both until it ends.
    """
    graph = graph_module.graph
    operands = [operand for operand in node.all_input_nodes if operand.op == "get_attr"]
    graph.erase_node(node)
    for operand in operands:
        if not operand.users:
            graph.erase_node(operand)
    named = {str(other.target) for other in graph.nodes if other.op == "get_attr"}
    _drop(graph_module, {str(operand.target) for operand in operands} - named, constants)


def computable(graph_module: fx.GraphModule, node: Any) -> bool:
    """Whether a node is a constant that new ones may be computed from.

    Excludes types narrower than float32, in which a product of weights would be rounded more than
    by fixed point.
    """
    value = constant(graph_module, node)
    return value is not None and value.dtype in _EXACT


def pure(node: fx.Node) -> bool:
    """Whether a call returns the same value in each step, and nothing writes to it."""
    if node.op != "call_function":
        return False
    written = any(
        isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable
        for user in node.users
    )
    if calls(node, operator.getitem):
        return not written
    overload = node.target
    return (
        isinstance(overload, torch._ops.OpOverload)
        and overload.namespace == "aten"
        and not overload._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in overload.tags
        and not written
    )


def evaluate(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """The result of a call in the clear, from the values of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    op = op_of(node)
    function: Any = node.target if op is None else op.reference
    with torch.no_grad():
        return function(*args, **kwargs)


def insert_evaluated(
    graph_module: fx.GraphModule,
    before: fx.Node,
    stem: str,
    value: torch.Tensor,
    vis: Vis,
    known: MutableMapping[str, Vis],
) -> fx.Node:
    """Insert a computed constant before a node, under a fresh name that begins with `stem`.

    Adds it to `known`, which maps constants to visibilities.
    """
    name = next(n for i in range(len(known) + 1) if (n := f"{stem}_{i}") not in known)
    known[name] = vis
    # A view would store its whole storage in the bundles.
    return insert_constant(graph_module, before, name, value.detach().clone())


def wide(graph_module: fx.GraphModule, node: Any) -> torch.Tensor:
    """A constant as float64, for computing with it. Raises InternalError for other nodes."""
    value = constant(graph_module, node)
    if value is None:
        raise InternalError(f"{node} is not a constant")
    return value.double()


def insert_folded(
    graph_module: fx.GraphModule,
    before: fx.Node,
    origin: fx.Node,
    value: torch.Tensor,
    known: MutableMapping[str, Vis],
    leaf: str = "",
) -> fx.Node:
    """Insert a constant computed from others, with the dtype and visibility of `origin`.

    It is named after `origin`, with another last part if `leaf` is given, and added to `known`,
    which maps constants to visibilities.
    """
    path, _, last = str(origin.target).rpartition(".")
    stem = f"{path}." * bool(path) + _DERIVED.sub("", leaf or last, count=1) + "_folded"
    names = (stem if i == 0 else f"{stem}_{i + 1}" for i in range(len(known) + 1))
    name = next(n for n in names if n not in known)
    known[name] = origin.meta["vis"]
    like = origin.meta["val"].dtype
    node = insert_constant(graph_module, before, name, value.to(like).contiguous())
    node.meta["vis"] = known[name]
    if value.numel() >= _LARGE:
        # The C library would keep what was computed in float64 before, several times a model.
        release_freed_memory()
    return node
