"""Recognize RMSNorm, written out or as torch's function."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, last_dim, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis


class FuseRmsNorm(Pass):
    """Fuses a written-out RMSNorm, which opens its row three times, into an op that opens it once.

    The gain may be missing, or `1 + weight` (gemma). The norm may be per head (qwen3).

    Before:
        %x = input : shared 1xnewx8
        %weight = constant : server 8
        %1 = aten.pow.Tensor_Scalar(%x, 2)
        %2 = aten.mean.dim(%1, [-1], True)
        %3 = aten.add.Tensor(%2, 1e-06)
        %4 = aten.rsqrt.default(%3)
        %5 = aten.mul.Tensor(%x, %4)
        %6 = aten.mul.Tensor(%weight, %5)
    After:
        %6 = mpc.rms_norm(%x, %weight, 1e-06, 0.0)
    """

    stage = "fuse"

    def run(self, graph_module: fx.GraphModule) -> int:
        return sum(self._fuse(node) for node in list(graph_module.graph.nodes))

    def _fuse(self, root: fx.Node) -> int:
        if calls(root, aten.rms_norm.default) and is_shared(root.args[0]):
            x, shape, weight, eps = (*root.args, None, None)[:4]
            if len(shape) != 1:  # type: ignore[arg-type]
                self.skip(root, "it normalizes over several dimensions")
                return 0
            if eps is None:
                eps = torch.finfo(root.meta["val"].dtype).eps
            replace(root, target("rms_norm"), (x, weight, float(eps), 0.0))  # type: ignore[arg-type]
            return 1
        if not calls(root, aten.rsqrt.default) or not is_shared(root):
            return 0
        matched = _mean_square(root.args[0])
        if matched is None:
            self.skip(root, "its operand is not a mean of squares over the last dimension")
            return 0
        x, eps = matched
        done = 0
        for product in list(root.users):
            if not calls(product, aten.mul.Tensor) or x not in product.args:
                self.skip(root, "the inverse root does not scale the row that it was computed from")
                continue
            gain = _gain(product)
            if gain is None:
                replace(product, target("rms_norm"), (x, None, eps, 0.0))
            else:
                node, weight, offset = gain
                replace(node, target("rms_norm"), (x, weight, eps, offset))
            done = 1
        return done


def _mean_square(node: Any) -> tuple[fx.Node, float] | None:
    """The row and eps of mean(row ** 2) + eps."""
    if not calls(node, aten.add.Tensor) or not isinstance(node.args[1], (int, float)):
        return None
    mean, eps = node.args
    if not calls(mean, aten.mean.dim) or len(mean.args) < 3 or not mean.args[2]:
        return None
    square, dims = mean.args[:2]
    if len(dims) != 1 or not last_dim(square, dims[0]):
        return None
    if calls(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return square.args[0], float(eps)
    if calls(square, aten.mul.Tensor) and square.args[0] is square.args[1]:
        return square.args[0], float(eps)
    return None


def _gain(product: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """The node that applies the gain, the weight, and the number added to the weight."""
    if len(product.users) != 1:
        return None
    (user,) = product.users
    if not calls(user, aten.mul.Tensor):
        return None
    other = user.args[1] if user.args[0] is product else user.args[0]
    if not isinstance(other, fx.Node) or other.meta["vis"] not in (Vis.SERVER, Vis.PUBLIC):
        return None
    if list(other.meta["val"].shape) != [product.meta["val"].shape[-1]]:
        return None
    if other.op == "get_attr":
        return user, other, 0.0
    if calls(other, aten.add.Tensor):
        pair = (other.args[0], other.args[1])
        for weight, offset in (pair, pair[::-1]):
            is_weight = isinstance(weight, fx.Node) and weight.op == "get_attr"
            if is_weight and isinstance(offset, (int, float)):
                return user, weight, float(offset)  # type: ignore[return-value]
    return None
