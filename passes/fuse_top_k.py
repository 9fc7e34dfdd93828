"""Recognize the gates of a mixture of experts, of which all but a row's k largest are zero."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

from torch import fx

from mergec.compiler.graph.ir import aten, calls, constant, is_shared, last_dim
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call
from mergec.runtime.core.op import target

_FAR = 64.0
"""What the chosen ones are raised by before a softmax, exp(-64) is less than 2e-28; and what scores
outside of the chosen groups are lowered by."""
_TINY = 1e-12
"""What keeps a model from dividing by zero is at most this, and is left out."""

_Weights = tuple[Literal["softmax", "ratio", "entries"], fx.Node, float]
"""The chosen ones' softmax, their entries by the sum of these, or their entries; the row that they
are chosen from; and a factor of all weights."""


class FuseTopK(Pass):
    """Turns weights that are scattered to the k largest of a row into gates of all its entries.

    Which entries are chosen is secret, so nothing can be gathered: all are multiplied by one or
    zero. A softmax of the chosen scores alone, or one that is divided by the sum of the chosen, is
    the softmax of all after these are raised by 64. That rounds the others to zero, and takes
    neither products nor a reciprocal. The largest are found before a softmax or a sigmoid, which
    keep their order: small differences are lost there.

    A router may choose groups of entries first, and fill in -inf outside of them (deepseek_v3).
    Then the largest groups are found in the same way, and the scores of other groups are lowered by
    64, which is more than they differ.

    Before:
        %x = input : shared newx8
        %1 = aten.softmax.int(%x, -1)
        %2 = aten.topk.default(%1, 2)
        %3 = sym.getitem(%2, 0)
        %4 = sym.getitem(%2, 1)
        %5 = aten.sum.dim_IntList(%3, [-1], True)
        %6 = aten.div.Tensor(%3, %5)
        %7 = aten.zeros_like.default(%x)
        %8 = aten.scatter.src(%7, -1, %4, %6)
    After:
        %top_k = mpc.top_k(%x, 2)
        %mul = aten.mul.Tensor(%top_k, 64.0)
        %add = aten.add.Tensor(%x, %mul)
        %softmax = aten.softmax.int(%add, -1)
    """

    stage = "fuse"

    def run(self, graph_module: fx.GraphModule) -> int:
        found = [n for n in graph_module.graph.nodes if calls(n, aten.scatter.src) and is_shared(n)]
        return sum(map(self._fuse, found))

    def _fuse(self, node: fx.Node) -> int:
        operands: tuple[Any, ...] = node.args
        zeros, dim, index, source = operands
        top = _of_top(index, 1)
        if top is None or not _same_rows(zeros, top.args[0]) or not last_dim(node, dim):
            self.skip(node, "it does not scatter to the largest entries of each row of zeros")
            return 0
        weights = _weights(source, top)
        if weights is None:
            self.skip(node, "its weights are not known functions of the largest entries")
            return 0
        compared = _compared(node, top.args[0])
        if compared is None:
            self.skip(node, "what is filled in is not the groups of scores that were not chosen")
            return 0
        mask = insert_call(node, target("top_k"), compared, top.args[1])
        node.replace_all_uses_with(_gates(node, weights, mask))
        return 1


def _gates(node: fx.Node, weights: _Weights, mask: fx.Node) -> fx.Node:
    """The weights of all entries, inserted before a node; mask: 1 for those that are chosen."""
    kind, row, factor = weights
    if kind == "softmax":
        far = insert_call(node, aten.mul.Tensor, mask, _FAR)
        total = insert_call(node, aten.add.Tensor, row, far)
        gates = insert_call(node, aten.softmax.int, total, -1)
    else:
        gates = insert_call(node, aten.mul.Tensor, row, mask)
    if kind == "ratio":
        total = insert_call(node, aten.sum.dim_IntList, gates, [-1], True)
        gates = insert_call(node, aten.div.Tensor, gates, total)
    return gates if factor == 1 else insert_call(node, aten.mul.Tensor, gates, factor)


def _of_top(node: Any, result: int) -> fx.Node | None:
    """The call whose largest values (0) or their places (1) a node is, along the last dimension."""
    if not calls(node, operator.getitem) or node.args[1] != result:
        return None
    top = node.args[0]
    if not calls(top, aten.topk.default) or top.kwargs:
        return None
    given: tuple[Any, ...] = top.args
    dim, largest = (*given, *(-1, True)[len(given) - 2 :])[2:4]
    return top if last_dim(node, dim) and largest else None


def _same_rows(zeros: Any, x: Any) -> bool:
    """Whether `zeros` are zeros of the shape of x."""
    made = calls(zeros, aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default)
    return made and _same_shape(zeros, x)


def _weights(source: Any, top: fx.Node) -> _Weights | None:
    """What weights of the chosen ones are; None if they are something else."""
    factor = 1.0
    if calls(source, aten.mul.Tensor) and isinstance(source.args[1], (int, float)):
        source, factor = source.args[0], float(source.args[1])
    scores = _scores(source)
    if scores is not None:
        x: Any = top.args[0]
        known = _of_top(scores, 0) is top and not _is_filled(x)
        return ("softmax", x, factor) if known else None
    chosen, total = source.args if calls(source, aten.div.Tensor) else (source, None)
    row = _row(chosen, top)
    if row is None:
        return None
    if total is None:
        return "entries", row, factor
    if not _is_sum(total, chosen, _are_positive(row)):
        return None
    # Of another row the chosen may be so small that raising them is not enough.
    scores = _scores(row) if row is top.args[0] else None
    return ("ratio", row, factor) if scores is None else ("softmax", scores, factor)


def _row(chosen: Any, top: fx.Node) -> fx.Node | None:
    """The row of which the entries at the places of the largest are taken; None for other nodes."""
    if _of_top(chosen, 0) is top:
        row: Any = top.args[0]
        return row.args[0] if _is_filled(row) else row
    if not calls(chosen, aten.gather.default) or _of_top(chosen.args[2], 1) is not top:
        return None
    row, dim = chosen.args[:2]
    return row if last_dim(row, dim) and _same_shape(row, top.args[0]) else None


def _same_shape(one: Any, other: Any) -> bool:
    return str(one.meta["val"].shape) == str(other.meta["val"].shape)


def _is_sum(total: Any, chosen: fx.Node, positive: bool) -> bool:
    """Whether a node is the sum of each row of `chosen`, but for a tiny number.

    positive: whether no sum is negative. Then it may be cut below a tiny number, which a clamp
    writes as a ReLU between two of them.
    """
    total = _less(total, aten.add.Tensor)
    if positive and calls(total, aten.relu.default, target("relu")):
        total = _less(total.args[0], aten.sub.Tensor)
    return _summed(total, keepdim=True) is chosen


def _summed(x: Any, *, keepdim: bool) -> fx.Node | None:
    """What a node is the sums of each row of; None for other nodes."""
    if not calls(x, aten.sum.dim_IntList):
        return None
    rows, dims, kept = (*x.args, False)[:3]
    return rows if len(dims) == 1 and last_dim(rows, dims[0]) and kept == keepdim else None


def _less(x: Any, call: Any) -> Any:
    """x without a tiny number that this call adds or subtracts."""
    tiny = calls(x, call) and isinstance(x.args[1], float) and x.args[1] <= _TINY
    return x.args[0] if tiny else x


def _scores(x: Any) -> fx.Node | None:
    """The scores that a softmax over the last dimension is of; None for other nodes."""
    return x.args[0] if calls(x, aten.softmax.int) and last_dim(x, x.args[1]) else None


def _compared(node: fx.Node, x: Any) -> Any:
    """What the largest of x are found among, inserted before a node; None if that is unknown."""
    if not _is_filled(x):
        return _in_same_order(x)
    scores, others, value = x.args
    found = _groups(others)
    if found is None or value != -math.inf or not _are_near(scores):
        return None
    top, moves = found
    groups, count = top.args[:2]
    if count == groups.meta["val"].shape[-1]:
        return scores
    mask = insert_call(node, target("top_k"), _sums(node, groups), count)
    for move in moves:
        mask = insert_call(node, move.target, mask, *move.args[1:])
    below = insert_call(node, aten.sub.Tensor, mask, 1.0)
    below = insert_call(node, aten.mul.Tensor, below, _FAR)
    return insert_call(node, aten.add.Tensor, scores, below)


def _is_filled(x: Any) -> bool:
    return calls(x, aten.masked_fill.Scalar)


def _groups(others: Any) -> tuple[Any, list[fx.Node]] | None:
    """Of a mask of all but the largest groups: the call that finds these, and the moves that give
    each entry its group's; None for other masks."""
    if not calls(others, aten.bitwise_not.default, aten.logical_not.default):
        return None
    mask: Any = others.args[0]
    mask = mask.args[0] if calls(mask, aten.to.dtype) else mask
    moves: list[fx.Node] = []
    while calls(mask, aten.reshape.default, aten.expand.default, aten.unsqueeze.default):
        moves.insert(0, mask)
        mask = mask.args[0]
    if not calls(mask, aten.scatter.value):
        return None
    zeros, dim, index, value = mask.args
    top = _of_top(index, 1)
    if top is None or value != 1 or not last_dim(mask, dim) or not _same_rows(zeros, top.args[0]):
        return None
    return top, moves


def _sums(node: fx.Node, groups: Any) -> Any:
    """The scores of groups; sums of each one's largest entries are those of all, times a mask."""
    top: Any = _of_top(_summed(groups, keepdim=False), 0)
    if top is None:
        return groups
    entries, count = top.args[:2]
    if count < entries.meta["val"].shape[-1]:
        mask = insert_call(node, target("top_k"), entries, count)
        entries = insert_call(node, aten.mul.Tensor, entries, mask)
    total = insert_call(node, aten.sum.dim_IntList, entries, [-1], True)
    return insert_call(node, aten.squeeze.dim, total, -1)


def _are_near(scores: Any) -> bool:
    """Whether scores surely differ by less than `_FAR`: probabilities, also with known biases."""
    spread = 1.0
    if calls(scores, aten.add.Tensor) and not scores.kwargs:
        scores, bias = scores.args
        value = constant(scores.graph.owning_module, bias)
        spread += math.inf if value is None else float(value.max() - value.min())
    return _are_positive(scores) and spread < _FAR - 1


def _in_same_order(x: fx.Node) -> fx.Node:
    """What a softmax or a sigmoid is of; x itself if it is neither."""
    inner: Any = x.args[0] if _is_sigmoid(x) else _scores(x)
    return inner or x


def _are_positive(x: Any) -> bool:
    """Whether a node is probabilities: of one row, or a sigmoid's."""
    return _is_sigmoid(x) or _scores(x) is not None


def _is_sigmoid(x: Any) -> bool:
    """Whether a node is a sigmoid, which may be a call of the dialect already."""
    return calls(x, aten.sigmoid.default, target("sigmoid"))
