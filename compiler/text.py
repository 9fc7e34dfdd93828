"""The printer of the textual IR: whole graphs, single nodes, and nodes within error messages.

    %ids = input : client int64 1xnew
    %table = constant : server 97x8
    %0 = mpc.embedding(%ids, %table) : shared 1xnewx8
    return [%0]

A type is visibility, fixed-point form (after legalization), dtype (inputs and constants, unless it
is float64) and shape. `new` and `past` are the lengths that vary from step to step.
`compiler.graph.parse` reads the same text. Contents of constants are not printed, except for public
constants of one element.
"""

from __future__ import annotations

import inspect
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mergec.runtime.core.op import REGISTRY, Op
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import MOVE_NAMES, target_name

DECLARED = ("placeholder", "get_attr", "output")
"""Kinds of nodes that are not calls."""


def op_of(node: fx.Node) -> type[Op] | None:
    """The dialect op that a node calls; None for other nodes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    namespace, _, name = node.target._schema.name.partition("::")
    return REGISTRY[name] if namespace == "mpc" else None


def bind(op: type[Op], node: fx.Node) -> dict[str, Any]:
    """The node's arguments by parameter name, in the order of the schema."""
    bound = inspect.signature(op.reference).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def assign_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A unique, stable and readable name for every node: its module and its function there.

    Nodes that prepare attention are named after their role: `layers.3.attn.q.rotary`,
    `layers.3.attn.mask`. A node of a parsed text keeps the name that it has there.
    """
    names: dict[fx.Node, str] = {}
    taken: dict[str, int] = {}
    parts = _attention_parts(graph)
    for node in graph.nodes:
        if node.op in DECLARED:
            names[node] = node.meta.get("name", str(node.target))
    used = {name for node, name in names.items() if node.op != "output"}
    for node in graph.nodes:
        if node.op in DECLARED:
            continue
        called = target_name(node.target)
        here = node.meta.get("module", ""), called.split(".")[1] if "." in called else called
        module, what = parts.get(node, here)
        stem = node.meta.get("label") or (f"{module}.{what}" if module else what)
        name = _next(stem, taken)
        while name in used:
            name = _next(stem, taken)
        used.add(name)
        names[node] = name
    return names


def _next(stem: str, taken: dict[str, int]) -> str:
    taken[stem] = taken.get(stem, 0) + 1
    return stem if taken[stem] == 1 else f"{stem}.{taken[stem]}"


def _attention_parts(graph: fx.Graph) -> dict[fx.Node, tuple[str, str]]:
    """Module and name of the values from which queries, keys, values, masks and tables come."""
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
    """Name the nodes between an operand of attention and the layer, or the cut, it comes from."""
    user = attention
    while isinstance(node, fx.Node) and node.op == "call_function" and node not in parts:
        name, op = target_name(node.target), op_of(node)
        others = [other for other in node.users if other is not user and other.op != "output"]
        if others or not (name in MOVE_NAMES or (op is not None and op.prepares)):
            return
        parts[node] = attention.meta.get("module", ""), f"{role}.{name.split('.')[1]}"
        user, node = node, node.args[0] if op is None else bind(op, node)[op.prepares]


def dump(graph_module: fx.GraphModule, *, secret_only: bool = False) -> str:
    """The graph as text, one line per input, constant and call; deterministic.

    `compiler.graph.parse` turns it into a graph again. secret_only: omit constants and values that
    all parties know (positions, masks, tables and lengths); such a text is only for reading.
    """
    graph = graph_module.graph
    lines = node_lines(graph, assign_names(graph))
    if secret_only:
        shown = {
            node: line
            for node, line in lines.items()
            if node.meta.get("vis") is not Vis.PUBLIC or node.op == "output"
        }
        return "\n".join(shown.values()) + "\n"
    inputs = [line for node, line in lines.items() if node.op == "placeholder"]
    calls = [line for node, line in lines.items() if node.op != "placeholder"]
    return "\n".join([*inputs, *_constant_lines(graph_module), *calls]) + "\n"


def node_lines(graph: fx.Graph, names: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """The line of each node. Constants have none here: they stand as arguments."""
    symbols = length_symbols(graph)
    return {node: _line(node, names, symbols) for node in graph.nodes if node.op != "get_attr"}


def _constant_lines(graph_module: fx.GraphModule) -> list[str]:
    """The declarations of constants, in the order of their first use."""
    declared: dict[str, str] = {}
    for user in graph_module.graph.nodes:
        for node in user.all_input_nodes:
            if node.op != "get_attr" or str(node.target) in declared:
                continue
            value = operator.attrgetter(str(node.target))(graph_module)
            public = node.meta.get("vis") is Vis.PUBLIC
            shown = f" {literal(value.item())}" if public and value.numel() == 1 else ""
            shape = "x".join(map(str, value.shape)) or "scalar"
            words = [_vis(node), dtype_text(value.dtype), shape]
            text = f"%{node.target} = constant{shown} : {' '.join(filter(None, words))}"
            declared[str(node.target)] = text
    return list(declared.values())


def _line(node: fx.Node, names: Mapping[fx.Node, str], symbols: Mapping[str, str]) -> str:
    def operand(arg: Any) -> str:
        return f"%{names[arg]}" if isinstance(arg, fx.Node) else repr(arg)

    def named(arg: Any) -> str:
        return literal(arg, operand)

    if node.op == "output":
        return f"return {named(node.args[0])}"
    if node.op == "placeholder":
        return f"%{names[node]} = input : {type_text(node, symbols)}"
    text = call_text(names[node], target_name(node.target), node.args, node.kwargs, named)
    return f"{text} : {type_text(node, symbols)}".rstrip(" :")


def call_text(
    name: str,
    target: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    text: Callable[[Any], str],
) -> str:
    """A call up to its type: `%name = target(args)`; `text` prints an argument."""
    arguments = [*map(text, args), *(f"{key}={text(arg)}" for key, arg in kwargs.items())]
    return f"%{name} = {target}({', '.join(arguments)})"


def literal(value: Any, name: Callable[[Any], str] = repr) -> str:
    """An argument as text. `name` prints the operands, which are not literals."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(literal(item, name) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {literal(item, name)}' for key, item in value.items())}}}"
    if isinstance(value, int) and value == sys.maxsize:
        return "end"
    if isinstance(value, (bool, int, float, str)) or value is None:
        return repr(value)
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value)
    return name(value)


def dtype_text(dtype: Any) -> str:
    """A dtype without `torch.`; nothing for float64, which graphs are compared in."""
    text = str(dtype).removeprefix("torch.")
    return "" if text == "float64" else text


def _vis(node: fx.Node) -> str:
    return node.meta["vis"].value if "vis" in node.meta else ""


def type_text(node: fx.Node, symbols: Mapping[str, str]) -> str:
    """Visibility, form, dtype and shape of a node's value, as far as they are known."""
    parts = [_vis(node)]
    if "form" in node.meta and node.meta.get("vis") is Vis.SHARED:
        form = node.meta["form"]
        parts += [f"f{node.meta['frac']}", "" if form == "share" else form]
    if "length" in node.meta:
        parts.append(node.meta["length"])
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        if node.op == "placeholder":
            parts.append(dtype_text(value.dtype))
        parts.append("x".join(_size(size, symbols) for size in value.shape) or "scalar")
    return " ".join(filter(None, parts))


def _size(size: Any, symbols: Mapping[str, str]) -> str:
    text = str(size)
    for symbol, name in symbols.items():
        text = re.sub(rf"\b{symbol}\b", name, text)
    text = text.replace(" ", "")
    return "+".join(sorted(text.split("+"), reverse=True)) if "+" in text else text


def length_symbols(graph: fx.Graph) -> dict[str, str]:
    """The names, "new", "past" and "source", of the symbolic lengths in the inputs' shapes; and
    "rows" where the number of positions that are revealed follows from them
    (`frontend.positions`)."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if "length" in node.meta:
            found[str(value)] = node.meta["length"]
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        given = node.meta.get("lengths", {})
        sizes: Sequence[Any] = value.shape
        for size in sizes:
            if not isinstance(size, int):
                usual = "new" if len(value.shape) == 2 else "past"
                found.setdefault(str(size), given.get(str(size), usual))
    return found


def layer_of(module: str) -> str:
    """`model.layers.3.self_attn.q_proj` belongs to `model.layers.3`, `lm_head` to itself."""
    parts = module.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: position + 1])
    return module or "(model)"


def place_text(module: str, source: str) -> str:
    """Where a node or an instruction comes from, as a comment after its line."""
    place = "  ".join(filter(None, (module, source)))
    return f"  # {place}" if place else ""


def describe(node: fx.Node) -> str:
    """The line of one node, with its module path and source line."""
    text = node_lines(node.graph, assign_names(node.graph)).get(node, f"%{node.target} = constant")
    return text + place_text(node.meta.get("module", ""), node.meta.get("source", ""))


def offences(nodes: Mapping[fx.Node, str]) -> list[str]:
    """Lines that show each node and its fault.

    The call is underlined. Nodes that call the same function with the same fault, at the same place
    in several layers, are shown once, with a list of the layers.
    """
    groups: dict[tuple[str, ...], list[fx.Node]] = {}
    for node, reason in nodes.items():
        module = node.meta.get("module", "")
        inside = module.removeprefix(layer_of(module))
        groups.setdefault((str(node.target), reason, inside), []).append(node)
    lines = []
    for (_, reason, _), members in groups.items():
        text = describe(members[0])
        before, equals, call = text.partition(" = ")
        if not equals:
            before, call = "", text
        # No literal contains " : ", so the first one ends the call.
        end = len(call.partition("  # ")[0].partition(" : ")[0])
        lines += [f"  {text}", f"  {' ' * len(before + equals)}{'^' * end}", f"  {reason}"]
        layers = list(dict.fromkeys(layer_of(node.meta.get("module", "")) for node in members))
        if len(layers) > 3:
            lines.append(f"  in {len(layers)} layers: {layers[0]} … {layers[-1]}")
        elif len(layers) > 1:
            lines.append(f"  in {len(layers)} layers: {', '.join(layers)}")
        elif len(members) > 1:
            lines.append(f"  {len(members)} times in {layers[0]}")
    return lines
