"""A new tensor that is written part by part becomes a concatenation of the parts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_NEW = frozenset(
    {
        _aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default,
        _aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default,
    }
)  # fmt: skip

_WHOLE = (0, sys.maxsize, 1)
"""Start, end and step of a slice that leaves nothing out."""


@dataclass(frozen=True)
class _Write:
    """`tensor[..., start:end].copy_(source)` along a dimension.

    slices: the calls that cut the part out, all but one of them along other dimensions as a whole.
    """

    slices: list[fx.Node]
    copy: fx.Node
    dim: int
    start: int
    end: int

    @property
    def source(self) -> Any:
        return self.copy.args[1]


def join_written_parts(graph: fx.Graph) -> None:
    """Replace a new tensor whose slices are all written before it is read by `aten.cat` of them.

    Multi-head latent attention builds its keys so. Slices must be along one dimension of known
    size, written in order, and cover it; each written tensor must have its slice's shape and dtype.
    Anything else stays, and is refused as a write in place.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target not in _NEW:
            continue
        users = sorted(node.users, key=order.__getitem__)
        writes = list(_writes(node, users))
        if not _covered(node, writes):
            continue
        last = writes[-1].copy
        if any(order[user] < order[last] for user in users[len(writes) :]):
            continue
        with graph.inserting_before(last):
            joined = graph.call_function(
                _aten.cat.default, ([write.source for write in writes], writes[0].dim)
            )
        joined.meta = dict(node.meta)
        for write in writes:
            for done in (write.copy, *reversed(write.slices)):
                graph.erase_node(done)
        node.replace_all_uses_with(joined)
        graph.erase_node(node)


def _writes(node: fx.Node, users: list[fx.Node]) -> Iterator[_Write]:
    """The first users, as long as each cuts out a part that serves as the target of one copy."""
    for user in users:
        write = _write(node, user)
        if write is None:
            return
        yield write


def _write(node: fx.Node, part: fx.Node) -> _Write | None:
    slices: list[fx.Node] = []
    while part.target is _aten.slice.Tensor and not part.kwargs and len(part.users) == 1:
        slices.append(part)
        (part,) = part.users
    cuts = [cut for cut in map(_cut, slices) if cut[1:] != _WHOLE]
    copies = part.target is _aten.copy_.default and slices and part.args[0] is slices[-1]
    if not copies or len(cuts) != 1 or part.users or not _alike(slices[-1], part.args[1]):
        return None
    ((dim, start, end, step),) = cuts
    shape = node.meta["val"].shape
    if step != 1 or not all(isinstance(place, int) for place in (shape[dim], start, end)):
        return None
    # Slices may count from the end, or reach beyond it.
    first, behind, _ = slice(start, end).indices(shape[dim])
    return _Write(slices, part, dim % len(shape), first, behind)


def _cut(part: fx.Node) -> tuple[Any, ...]:
    """Dimension, start, end and step of a slice."""
    given: list[Any] = list(part.args[1:])
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    return dim, start or 0, sys.maxsize if end is None else end, step


def _alike(part: fx.Node, source: Any) -> bool:
    if not isinstance(source, fx.Node):
        return False
    wanted, given = part.meta["val"], source.meta["val"]
    # A size may be an expression; the same expression prints the same.
    same = str(wanted.shape) == str(given.shape)
    return same and wanted.dtype is given.dtype and wanted.device == given.device


def _covered(node: fx.Node, writes: list[_Write]) -> bool:
    if not writes or len({write.dim for write in writes}) > 1:
        return False
    ends = [0, *(write.end for write in writes)]
    size = node.meta["val"].shape[writes[0].dim]
    return ends[-1] == size and all(
        write.start == end for write, end in zip(writes, ends, strict=False)
    )
