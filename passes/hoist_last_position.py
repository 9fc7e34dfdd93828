"""Select the last position before the last layers instead of after them."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, bind, calls, is_shared, op_of, rank
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import ROWS, insert_call
from mergec.runtime.core.op import LAST, Op

Take = Callable[[Any, int], Any]


class HoistLastPosition(Pass):
    """Moves the selection of the last position up, past all ops that work on each position alone.

    Such ops commute with the selection; `Op.last_position` says which they are. The selection moves
    from the result to the operands, as far up as possible. So a prompt's other positions skip the
    final norm and, in the last layer, the MLP, the output projection and the queries with their
    attention; only their keys and values are computed. The last layer then costs a prompt of n
    tokens little more than its keys and values. A single new token is its own last position, so
    decoding does not change. Where drafted tokens are checked, it does the same for the last `rows`
    positions, whose number follows from the step's lengths (`compiler.frontend.positions`).

    Before:
        %x = input : shared 1xnewx8
        %weight = constant : server 16x8
        %1 = mpc.rms_norm(%x, None, 1e-06)
        %2 = mpc.linear(%1, %weight)
        %3 = aten.slice.Tensor(%2, 1, -1, end)
    After:
        %slice = aten.slice.Tensor(%x, 1, -1, end)
        %1 = mpc.rms_norm(%slice, None, 1e-06)
        %2 = mpc.linear(%1, %weight)
    """

    stage = "optimize"

    def run(self, graph_module: fx.GraphModule) -> int:
        self.taken: dict[tuple[fx.Node, int], fx.Node] = {}
        self.start, self.rows = _kept(graph_module.graph)
        pending = [n for n in graph_module.graph.nodes if self._selects(n) is not None]
        sites = 0
        while pending:
            selection = pending.pop()
            dim = self._selects(selection)
            if dim is None:
                continue
            value: Any = selection.args[0]
            if not is_shared(value) or any(self._selects(user) != dim for user in value.users):
                continue
            args = _operands(value, dim, self._take, self.rows)
            if args is None:
                continue
            row = self._rebuild(value, args, selection)
            # A selection that failed before may now be the only user of its value.
            pending += row.all_input_nodes
            sites += 1
        return sites

    def _take(self, operand: Any, dim: int) -> fx.Node:
        """The operand's last position, selected once for all users, right after the operand."""
        if (operand, dim) not in self.taken:
            others = [user for user in operand.users if self._selects(user) == dim]
            last = operand, dim, self.start, sys.maxsize
            known = isinstance(self.start, int) or self.start < operand
            place = operand.next if known else self.start.next
            made = insert_call(place, aten.slice.Tensor, *last)
            made.meta |= {key: operand.meta.get(key, "") for key in ("module", "source")}
            for other in others:
                other.replace_all_uses_with(made)
                operand.graph.erase_node(other)
            self.taken[operand, dim] = made
        return self.taken[operand, dim]

    def _selects(self, node: fx.Node) -> int | None:
        """The dimension of variable length whose last positions a node selects; None if none."""
        if not calls(node, aten.slice.Tensor) or len(node.args) < 3:
            return None
        x: Any = node.args[0]
        if x is None:  # an erased node
            return None
        given: list[Any] = [*node.args[1:], *(None, 1)[len(node.args) - 3 :]]
        dim, start, end, step = given
        variable = not isinstance(x.meta["val"].shape[dim], int)
        if variable and start == self.start and end in (None, sys.maxsize) and step == 1:
            return int(dim) % rank(x)
        return None

    @staticmethod
    def _rebuild(value: fx.Node, args: tuple[Any, ...], selection: fx.Node) -> fx.Node:
        """Replace the selections of a call's result by the call on selected operands."""
        graph = value.graph
        with graph.inserting_before(value):
            row = graph.call_function(value.target, args, value.kwargs)  # type: ignore[arg-type]
        row.meta = dict(value.meta)
        row.meta["val"] = selection.meta["val"]
        for user in list(value.users):
            user.replace_all_uses_with(row)
            graph.erase_node(user)
        graph.erase_node(value)
        return row


def _kept(graph: fx.Graph) -> tuple[Any, Any]:
    """Where the last positions start, counted from the end, and how many they are: -1 and 1, or
    nodes that compute them."""
    for node in graph.nodes:
        if node.meta.get("length") == ROWS:
            return next(user for user in node.users if user.target is operator.neg), node
    return -1, 1


def _operands(value: fx.Node, dim: int, take: Take, rows: Any) -> tuple[Any, ...] | None:
    """The arguments that compute a call's last positions alone; None if it mixes positions."""
    if value.op != "call_function" or value.kwargs:
        return None
    op = op_of(value)
    if op is not None:
        return _of_op(value, op, dim, take, rows)
    if calls(value, aten.cat.default):
        parts, along = (*value.args, 0)[:2]
        if along % rank(value) == dim:  # type: ignore[operator]
            return None
        return [take(part, dim) for part in parts], along  # type: ignore[union-attr]
    return _moved(value, dim, take, rows)


def _of_op(value: fx.Node, op: type[Op], dim: int, take: Take, rows: Any) -> tuple[Any, ...] | None:
    """Like `_operands`, for an op of the dialect, which has its own rule."""
    rule = op.last_position(dim - rank(value))
    if rule is None:
        return None
    # What is left of a rule is a number of positions.
    rule = {name: rule[name] if rule[name] is LAST else rows for name in rule}
    return tuple(
        _aligned(value, dim, arg, take) if rule.get(name) is LAST else rule.get(name, arg)
        for name, arg in list(bind(op, value).items())[: len(value.args)]
    )


def _aligned(value: fx.Node, dim: int, operand: Any, take: Take) -> Any:
    """The part of an operand that broadcasts to the result's last position."""
    if not isinstance(operand, fx.Node):
        return operand
    own = dim - (rank(value) - rank(operand))
    stretched = own < 0 or operand.meta["val"].shape[own] == 1
    return operand if stretched else take(operand, own)


def _moved(value: fx.Node, dim: int, take: Take, rows: Any) -> tuple[Any, ...] | None:
    """Like `_operands`, for a call that moves a single operand."""
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
        return _reshaped(value, dim, take, rows)
    return None


def _reshaped(value: fx.Node, dim: int, take: Take, rows: Any) -> tuple[Any, ...] | None:
    """A reshape keeps positions apart if the same number of elements precedes their dimension."""
    x: Any = value.args[0]
    sizes = list(value.meta["val"].shape)
    before = list(x.meta["val"].shape)
    for own, size in enumerate(before):
        if str(size) != str(sizes[dim]) or not _all_known(before[:own], sizes[:dim]):
            continue
        if math.prod(before[:own]) == math.prod(sizes[:dim]) and _all_known(sizes[dim + 1 :]):
            return take(x, own), [*sizes[:dim], rows, *sizes[dim + 1 :]]
    return None


def _all_known(*sizes: list[Any]) -> bool:
    return all(isinstance(size, int) for group in sizes for size in group)
