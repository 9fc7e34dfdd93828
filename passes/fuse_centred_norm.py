"""Recognize LayerNorm that is written out in elementary ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, last_dim, rank
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis


class FuseCentredNorm(Pass):
    """Fuses a written-out LayerNorm, which opens its row four times, into an op that opens it once.

    Runs before `fuse_rms_norm`, which would mistake the centred row for the row of an RMSNorm.

    Before:
        %x = input : shared 1xnewx8
        %weight = constant : server 8
        %bias = constant : server 8
        %1 = aten.mean.dim(%x, [-1], True)
        %2 = aten.sub.Tensor(%x, %1)
        %3 = aten.pow.Tensor_Scalar(%2, 2)
        %4 = aten.mean.dim(%3, [-1], True)
        %5 = aten.add.Tensor(%4, 1e-05)
        %6 = aten.rsqrt.default(%5)
        %7 = aten.mul.Tensor(%2, %6)
        %8 = aten.mul.Tensor(%weight, %7)
        %9 = aten.add.Tensor(%8, %bias)
    After:
        %layer_norm = mpc.layer_norm(%x, %weight, %bias, 1e-05)
    """

    stage = "fuse"

    def run(self, graph_module: fx.GraphModule) -> int:
        return sum(self._fuse(node) for node in list(graph_module.graph.nodes))

    def _fuse(self, root: fx.Node) -> int:
        if not calls(root, aten.rsqrt.default) or not is_shared(root):
            return 0
        matched = _variance(root.args[0])
        if matched is None:
            return 0
        x, eps = matched
        done = 0
        for product in list(root.users):
            found = _row(product, root, x)
            if found is None:
                self.skip(root, "the inverse root does not scale the row that it was computed from")
                continue
            node, weight = product, found[0]
            if weight is None:
                node, weight = _applied(node, aten.mul.Tensor)
            node, bias = _applied(node, aten.add.Tensor)
            norm = insert_call(node, target("layer_norm"), x, weight, bias, eps)
            node.replace_all_uses_with(norm)
            done = 1
        return done


def _variance(node: Any) -> tuple[fx.Node, float] | None:
    """The row and eps of mean((row - mean(row)) ** 2) + eps."""
    if not calls(node, aten.add.Tensor) or not isinstance(node.args[1], (int, float)):
        return None
    square = _mean_of(node.args[0])
    squared = calls(square, aten.pow.Tensor_Scalar) and square.args[1] == 2
    if not squared and not (calls(square, aten.mul.Tensor) and square.args[0] is square.args[1]):
        return None
    row = _centred(square.args[0])
    return None if row is None else (row, float(node.args[1]))


def _mean_of(node: Any) -> Any:
    """The operand of a mean over the last dimension with keepdim=True."""
    if not calls(node, aten.mean.dim) or len(node.args) < 3 or not node.args[2]:
        return None
    x, dims = node.args[:2]
    return x if len(dims) == 1 and last_dim(x, dims[0]) else None


def _centred(node: Any) -> Any:
    """The row of row - mean(row)."""
    if calls(node, aten.sub.Tensor) and _mean_of(node.args[1]) is node.args[0]:
        return node.args[0]
    return None


def _row(product: fx.Node, root: fx.Node, x: fx.Node) -> tuple[Any] | None:
    """The gain, or None, in a product of the centred row (perhaps times a gain) with its root."""
    if not calls(product, aten.mul.Tensor):
        return None
    first, second = product.args
    other: Any = second if first is root else first
    if _centred(other) is x:
        return (None,)
    if calls(other, aten.mul.Tensor):
        for row, weight in (other.args, other.args[::-1]):
            if _centred(row) is x and _features(weight, x):
                return (weight,)
    return None


def _applied(node: fx.Node, operation: Any) -> tuple[fx.Node, fx.Node | None]:
    """The only user if it applies a row of weights, and that row; otherwise the node itself."""
    for user, other in _only_user(node):
        if calls(user, operation) and not user.kwargs and _features(other, node):
            return user, other
    return node, None


def _only_user(node: fx.Node) -> Iterator[tuple[fx.Node, Any]]:
    if len(node.users) == 1:
        (user,) = node.users
        if len(user.args) == 2:
            yield user, user.args[1] if user.args[0] is node else user.args[0]


def _features(weight: Any, row: fx.Node) -> bool:
    """Whether it is a constant with one number per feature."""
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    held = weight.meta["vis"] in (Vis.SERVER, Vis.PUBLIC)
    return held and rank(weight) == 1 and weight.meta["val"].shape == row.meta["val"].shape[-1:]
