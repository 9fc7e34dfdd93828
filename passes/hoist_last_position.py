"""Select the last position before the last layers work on it, not after."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, rank
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call
from mergec.runtime.core.structural import target_name

_ELEMENTWISE = frozenset(
    f"mpc.{name}" for name in ("silu", "gelu", "quick_gelu", "tanh", "sigmoid", "exp", "relu",
                               "square", "rsqrt", "reciprocal", "scale", "shift")
)  # fmt: skip
_BY_ROW = frozenset(f"mpc.{name}" for name in ("linear", "rms_norm", "layer_norm", "softmax"))
_BROADCAST = frozenset(f"mpc.{name}" for name in ("add", "sub", "mul", "glu"))

Take = Callable[[Any, int], Any]


class HoistLastPosition(Pass):
    """Whatever works on each position alone commutes with the choice of the last one.

    So a prompt's other positions skip the final norm, and of the last layer the MLP, the output
    projection, and the queries with their attention; their keys and values are all that is kept of
    them. A last layer then costs a prompt of n tokens little more than its keys and values. A
    single new token is its own last position: for decoding nothing changes.

    Before:
        %1 = mpc.rms_norm(%x, None, 1e-06)
        %2 = mpc.linear(%1, %weight)
        %3 = aten.slice.Tensor(%2, 1, -1, end)
    After:
        %1 = aten.slice.Tensor(%x, 1, -1, end)
        %2 = mpc.rms_norm(%1, None, 1e-06)
        %3 = mpc.linear(%2, %weight)
    """

    stage = "optimize"

    def run(self, graph_module: fx.GraphModule) -> int:
        self.taken: dict[tuple[fx.Node, int], fx.Node] = {}
        pending = [node for node in graph_module.graph.nodes if _selects(node) is not None]
        sites = 0
        while pending:
            selection = pending.pop()
            dim = _selects(selection)
            if dim is None:
                continue
            value: Any = selection.args[0]
            if not is_shared(value) or any(_selects(user) != dim for user in value.users):
                continue
            args = _operands(value, dim, self._take)
            if args is None:
                continue
            row = self._rebuild(value, args, selection)
            # Also a selection that was tried before: now it may be all that is used of its value.
            pending += row.all_input_nodes
            sites += 1
        return sites

    def _take(self, operand: Any, dim: int) -> fx.Node:
        """The operand's last position, selected right after it is made, once for all users."""
        if (operand, dim) not in self.taken:
            others = [user for user in operand.users if _selects(user) == dim]
            made = insert_call(operand.next, aten.slice.Tensor, operand, dim, -1, sys.maxsize)
            made.meta |= {key: operand.meta.get(key, "") for key in ("module", "source")}
            for other in others:
                other.replace_all_uses_with(made)
                operand.graph.erase_node(other)
            self.taken[operand, dim] = made
        return self.taken[operand, dim]

    @staticmethod
    def _rebuild(value: fx.Node, args: tuple[Any, ...], selection: fx.Node) -> fx.Node:
        """Put the call on selected operands in the place of the selections of its result."""
        graph = value.graph
        with graph.inserting_before(value):
            row = graph.call_function(value.target, args, value.kwargs)  # type: ignore[arg-type]
        row.meta = {key: item for key, item in value.meta.items() if key != "val_of"}
        row.meta["val"] = selection.meta["val"]
        for user in list(value.users):
            user.replace_all_uses_with(row)
            graph.erase_node(user)
        graph.erase_node(value)
        return row


def _selects(node: fx.Node) -> int | None:
    """The dimension, of variable length, of which a node is the last position alone."""
    if not calls(node, aten.slice.Tensor) or len(node.args) < 3:
        return None
    x: Any = node.args[0]
    if x is None:  # an erased node
        return None
    given: list[Any] = [*node.args[1:], *(None, 1)[len(node.args) - 3 :]]
    dim, start, end, step = given
    variable = not isinstance(x.meta["val"].shape[dim], int)
    if variable and start == -1 and end in (None, sys.maxsize) and step == 1:
        return int(dim) % rank(x)
    return None


def _operands(value: fx.Node, dim: int, take: Take) -> tuple[Any, ...] | None:
    """The arguments that give the last position of a call alone; None if it mixes positions."""
    name = target_name(value.target)
    inner = dim < rank(value) - 1
    if value.op != "call_function" or value.kwargs:
        return None
    if name in _ELEMENTWISE or (name in _BY_ROW and inner):
        return (take(value.args[0], dim), *value.args[1:])
    if name in _BROADCAST or (name == "mpc.rotary" and inner):
        return tuple(_aligned(value, dim, arg, take) for arg in value.args)
    if name == "mpc.constant_attention" and dim == 2:
        return (*value.args[:2], 1)
    if name in ("mpc.attention", "mpc.ratio_attention") and dim == 2:
        query, keys, values, mask, *rest = value.args
        return take(query, dim), keys, values, _aligned(value, dim, mask, take), *rest
    if calls(value, aten.cat.default):
        parts, along = (*value.args, 0)[:2]
        if along % rank(value) == dim:  # type: ignore[operator]
            return None
        return [take(part, dim) for part in parts], along  # type: ignore[union-attr]
    return _moved(value, dim, take)


def _aligned(value: fx.Node, dim: int, operand: Any, take: Take) -> Any:
    """An operand that is broadcast to the result, at the result's last position."""
    if not isinstance(operand, fx.Node):
        return operand
    own = dim - (rank(value) - rank(operand))
    stretched = own < 0 or operand.meta["val"].shape[own] == 1
    return operand if stretched else take(operand, own)


def _moved(value: fx.Node, dim: int, take: Take) -> tuple[Any, ...] | None:
    """As `_operands`, for movement of a single operand."""
    x: Any = value.args[0]
    rest: Any = value.args[1:]
    if calls(value, aten.permute.default):
        return take(x, rest[0][dim] % rank(x)), *rest
    if calls(value, aten.unsqueeze.default):
        added = rest[0] % rank(value)
        return None if added == dim else (take(x, dim - (added < dim)), *rest)
    if calls(value, aten.select.int, aten.squeeze.dim):
        gone = rest[0] % rank(x)
        return take(x, dim + (gone <= dim)), *rest
    if calls(value, aten.slice.Tensor):
        return None if rest[0] % rank(x) == dim else (take(x, dim), *rest)
    if calls(value, aten.reshape.default):
        return _reshaped(value, dim, take)
    return None


def _reshaped(value: fx.Node, dim: int, take: Take) -> tuple[Any, ...] | None:
    """A reshape keeps positions apart if the same dimension stands behind as many elements."""
    x: Any = value.args[0]
    sizes = list(value.meta["val"].shape)
    before = list(x.meta["val"].shape)
    for own, size in enumerate(before):
        if str(size) != str(sizes[dim]) or not _all_known(before[:own], sizes[:dim]):
            continue
        if math.prod(before[:own]) == math.prod(sizes[:dim]) and _all_known(sizes[dim + 1 :]):
            return take(x, own), [*sizes[:dim], 1, *sizes[dim + 1 :]]
    return None


def _all_known(*sizes: list[Any]) -> bool:
    return all(isinstance(size, int) for group in sizes for size in group)
