"""Residual streams: values that are only added up, between the layers that write and read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mergec.compiler.graph.ir import calls
from mergec.compiler.graph.moves import keeps_rows
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis

_NORMS = ("rms_norm", "layer_norm", "rms_norm_linear", "layer_norm_linear")
"""Ops whose first operand is a row that they normalize."""


@dataclass
class Stream:
    """Values of one width that sums and moves of whole rows connect.

    writers: the values that are added, which no sum computes. values: all of them, the writers too.
    readers: norms that take a value of the stream as their row. others: any other user, and sums
    that broadcast along a row.
    """

    width: int
    values: dict[fx.Node, None] = field(default_factory=dict)
    writers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)


def streams(graph: fx.Graph) -> list[Stream]:
    """The streams that norms read, in the order of their first norms."""
    found: list[Stream] = []
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if not _is_norm(node) or node.args[0] in seen:
            continue
        width = _width(node.args[0])
        if width:
            found.append(_stream(node.args[0], width))
            seen |= set(found[-1].values)
    return found


def _stream(start: Any, width: int) -> Stream:
    stream = Stream(width)
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node in stream.values:
            continue
        stream.values[node] = None
        sources = _sources(node)
        if sources:
            waiting += sources
        else:
            stream.writers.append(node)
        for user in node.users:
            if _is_norm(user) and user.args[0] is node:
                stream.readers.append(user)
            elif node in _sources(user) and _width(user) == width:
                waiting.append(user)
            else:
                stream.others.append(user)
    stream.others += [node for node in stream.values if _width(node) != width]
    return stream


def _sources(node: fx.Node) -> list[Any]:
    """The operands that a value of a stream is the sum of, or the move; none for a writer."""
    if calls(node, target("add")):
        return [operand for operand in node.args if isinstance(operand, fx.Node)]
    if keeps_rows(node) and node.meta.get("vis") is Vis.SHARED:
        return [node.args[0]]
    return []


def _is_norm(node: fx.Node) -> bool:
    return calls(node, *map(target, _NORMS))


def _width(node: Any) -> int:
    """The number of columns of a value; 0 if it has none, or a number that varies."""
    shape: Any = getattr(node.meta.get("val"), "shape", ())
    return shape[-1] if len(shape) and isinstance(shape[-1], int) else 0
