"""Graph helpers, and the text form in which graphs are read, compared and reported.

Keys of node.meta: "val" example value (fake tensor with symbolic sizes); "module", "source" where
the node comes from; "pass" which pass made it; "vis" who knows the value; "range" its least and
largest number in calibration, beside what `Op.measure` names; "form", "frac" how a shared wire is
held (see legalize).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from mergec.runtime.core.op import REGISTRY, Op
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import MOVE_NAMES, target_name

aten = torch.ops.aten


def calls(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of these overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def op_of(node: fx.Node) -> type[Op] | None:
    """The dialect op that a node calls, if it calls one."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    namespace, _, name = node.target._schema.name.partition("::")
    return REGISTRY[name] if namespace == "mpc" else None


def bind(op: type[Op], node: fx.Node) -> dict[str, Any]:
    """The node's arguments by parameter name, in the order of the schema."""
    bound = inspect.signature(op.reference).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def absmax(node: fx.Node) -> float:
    """How large the node's value got in calibration; 0 where that is not known."""
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


def replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Put a call in the node's place: same users, same meta. The node is left dead."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    return new


def insert(before: fx.Node, target: Any, args: tuple[Any, ...], val: Any, vis: Vis) -> fx.Node:
    """A further node before another one, from the same place in the model."""
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
    """A further constant of the graph, read before a node; `name` may be a path of modules."""
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


def assign_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A unique, stable, readable name for every node: its module and what it does there.

    On the way to attention also for what: `layers.3.attn.q.rotary`, `layers.3.attn.mask`.
    """
    names: dict[fx.Node, str] = {}
    taken: dict[str, int] = {}
    parts = _attention_parts(graph)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            names[node] = node.meta.get("name", str(node.target))
            continue
        here = node.meta.get("module", ""), target_name(node.target).split(".")[1]
        module, what = parts.get(node, here)
        name = f"{module}.{what}" if module else what
        taken[name] = taken.get(name, 0) + 1
        names[node] = name if taken[name] == 1 else f"{name}.{taken[name]}"
    return names


def _attention_parts(graph: fx.Graph) -> dict[fx.Node, tuple[str, str]]:
    """Module and name of the values that make queries, keys and values, masks and tables."""
    parts: dict[fx.Node, tuple[str, str]] = {}
    for node in graph.nodes:
        op = op_of(node)
        if op is None or not op.parts:
            continue
        arguments = bind(op, node)
        for what in op.parts:
            operand = arguments[what]
            if what in op.operands:
                _name_chain(parts, what, node, operand)
            elif isinstance(operand, fx.Node) and operand.op == "call_function":
                parts.setdefault(operand, (operand.meta.get("module", ""), what))
    return parts


def _name_chain(
    parts: dict[fx.Node, tuple[str, str]], role: str, attention: fx.Node, node: Any
) -> None:
    """Name the nodes between an operand of attention and the layer, or the cut, that makes it."""
    user = attention
    while isinstance(node, fx.Node) and node.op == "call_function" and node not in parts:
        name, op = target_name(node.target), op_of(node)
        others = [other for other in node.users if other is not user and other.op != "output"]
        if others or not (name in MOVE_NAMES or (op is not None and op.prepares)):
            return
        parts[node] = attention.meta.get("module", ""), f"{role}.{name.split('.')[1]}"
        user, node = node, node.args[0] if op is None else bind(op, node)[op.prepares]


def dump(graph_module: fx.GraphModule, *, secret_only: bool = False) -> str:
    """The graph as text, one line per node; deterministic, so that it can be compared.

    secret_only leaves out what all parties know: positions, masks, tables and lengths.
    """
    lines = node_lines(graph_module.graph, assign_names(graph_module.graph))
    shown = [
        line
        for node, line in lines.items()
        if not secret_only or not is_public(node) or node.op == "output"
    ]
    return "\n".join(shown) + "\n"


def node_lines(graph: fx.Graph, names: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """The line of text that tells of each node; constants have none, they stand as arguments."""
    symbols = length_symbols(graph)
    return {node: _line(node, names, symbols) for node in graph.nodes if node.op != "get_attr"}


def _line(node: fx.Node, names: dict[fx.Node, str], symbols: dict[str, str]) -> str:
    if node.op == "output":
        return f"return {_text(node.args[0], names)}"
    if node.op == "placeholder":
        text = f"%{names[node]} = input"
    else:
        arguments = [_text(arg, names) for arg in node.args]
        arguments += [f"{key}={_text(arg, names)}" for key, arg in node.kwargs.items()]
        text = f"%{names[node]} = {target_name(node.target)}({', '.join(arguments)})"
    return f"{text} : {_type(node, symbols)}"


def _text(arg: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(arg, fx.Node):
        return f"%{names[arg]}"
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(_text(item, names) for item in arg)}]"
    if isinstance(arg, int) and arg == sys.maxsize:
        return "end"
    return f"{arg:g}" if isinstance(arg, float) else str(arg)


def _type(node: fx.Node, symbols: dict[str, str]) -> str:
    parts = []
    if "vis" in node.meta:
        parts.append(node.meta["vis"].value)
    if "form" in node.meta and node.meta.get("vis") is Vis.SHARED:
        form = node.meta["form"]
        parts.append(f"f{node.meta['frac']}" + ("" if form == "share" else f" {form}"))
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        parts.append("x".join(_size(size, symbols) for size in value.shape) or "scalar")
    return " ".join(parts)


def _size(size: Any, symbols: dict[str, str]) -> str:
    text = str(size)
    for symbol, name in symbols.items():
        text = text.replace(symbol, name)
    return "+".join(sorted(text.replace(" ", "").split("+"), reverse=True)) if "+" in text else text


def length_symbols(graph: fx.Graph) -> dict[str, str]:
    """The names, "new" and "past", of the symbolic lengths in the inputs' shapes."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        sizes: Iterable[Any] = [s for s in value.shape if not isinstance(s, int)]
        for size in sizes:
            found.setdefault(str(size), "new" if len(value.shape) == 2 else "past")
    return found
