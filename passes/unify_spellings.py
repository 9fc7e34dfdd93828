"""Rewrite each operation to one spelling: functional calls, slices instead of splits, reshapes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import aten, calls, insert, rank, replace
from mergec.compiler.graph.rewriting import Pass

_IN_PLACE = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.scatter_.value: aten.scatter.value,
    aten.add.Scalar: aten.add.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.bmm.default: aten.matmul.default,
    aten.mm.default: aten.matmul.default,
}
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)


class UnifySpellings(Pass):
    """Rewrites variants of one operation to a single spelling, so later patterns need one form.

    Before:
        %x = input : shared 1xnewx8
        %1 = aten.split.Tensor(%x, 4, -1)
        %2 = sym.getitem(%1, 1)
        %3 = aten.div_.Tensor(%2, 8.0)
    After:
        %2 = aten.slice.Tensor(%x, -1, 4, 8)
        %3 = aten.div.Tensor(%2, 8.0)

    So is softmax(x - max(x)), which is softmax(x).
    """

    stage = "canonicalize"
    after = ("remove_noops",)

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _IN_PLACE:
                node.target = _IN_PLACE[node.target]
                sites += 1
            elif calls(node, aten.numpy_T.default, aten.t.default):
                order = list(reversed(range(rank(node))))
                replace(node, aten.permute.default, (node.args[0], order))
                sites += 1
            elif calls(node, aten.transpose.int):
                dims = list(range(rank(node)))
                a: Any = node.args[1]
                b: Any = node.args[2]
                dims[a], dims[b] = dims[b], dims[a]
                replace(node, aten.permute.default, (node.args[0], dims))
                sites += 1
            elif calls(node, aten.flatten.using_ints):
                replace(node, aten.reshape.default, (node.args[0], _shape_of(node)))
                sites += 1
            elif calls(node, *_SPLITS):
                sites += self._split(node)
            elif calls(node, aten.softmax.int) and _shifted(node) is not None:
                node.update_arg(0, _shifted(node))
                sites += 1
            elif calls(node, aten.add.Tensor, aten.sub.Tensor) and "alpha" in node.kwargs:
                self._alpha(node)
                sites += 1
        return sites

    @staticmethod
    def _alpha(node: fx.Node) -> None:
        """`add(x, y, alpha=a)` is `add(x, mul(y, a))`."""
        addend: Any = node.args[1]
        alpha = node.kwargs["alpha"]
        if isinstance(addend, fx.Node):
            val, vis = addend.meta["val"], addend.meta["vis"]
            scaled: Any = insert(node, aten.mul.Tensor, (addend, alpha), val, vis)
        else:
            scaled = addend * alpha
        node.args, node.kwargs = (node.args[0], scaled), {}

    def _split(self, node: fx.Node) -> int:
        dim = _dim(node)
        pieces = node.meta["val"]
        offsets = [0]
        for piece in pieces:
            offsets.append(offsets[-1] + piece.shape[dim])
        if not all(isinstance(offset, int) for offset in offsets):
            self.skip(node, "the size of its pieces depends on a variable length")
            return 0
        for user in list(node.users):
            if not calls(user, operator.getitem):
                self.skip(node, "its pieces are not selected one by one")
                return 0
        for user in list(node.users):
            index: Any = user.args[1]
            replace(
                user, aten.slice.Tensor, (node.args[0], dim, offsets[index], offsets[index + 1])
            )
        return 1


def _shifted(softmax: fx.Node) -> fx.Node | None:
    """x, where a softmax is of x less the maximum of each of its rows; None elsewhere."""
    operands: tuple[Any, ...] = softmax.args
    shifted, along = operands[:2]
    if not calls(shifted, aten.sub.Tensor) or shifted.kwargs:
        return None
    x, most = shifted.args
    if calls(most, operator.getitem) and most.args[1] == 0:
        most = most.args[0]
    if not calls(most, aten.max.dim, aten.amax.default) or most.args[0] is not x:
        return None
    _, dims, keepdim = (*most.args, None, False)[:3]
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    same = [dim % rank(softmax) for dim in dims] == [along % rank(softmax)]
    return x if keepdim and same else None


def _dim(node: fx.Node) -> int:
    if "dim" in node.kwargs:
        return node.kwargs["dim"]  # type: ignore[return-value]
    return node.args[2] if len(node.args) > 2 else 0  # type: ignore[return-value]


def _shape_of(node: fx.Node) -> list[Any]:
    """The node's shape as reshape arguments; its operand supplies the lengths at run time."""
    source = node.args[0]
    sizes: list[Any] = list(node.meta["val"].shape)
    given: list[torch.SymInt | int] = list(source.meta["val"].shape)  # type: ignore[union-attr]
    for index, size in enumerate(sizes):
        if isinstance(size, int):
            continue
        for dim, candidate in enumerate(given):
            if str(candidate) == str(size):
                sizes[index] = insert(
                    node, aten.sym_size.int, (source, dim), size, node.meta["vis"]
                )
                break
    return sizes
