"""Convert the remaining arithmetic on shared values into ops of the dialect."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, constant, insert, is_shared, last_dim, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis

_BINARY = {aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul"}
_UNARY = {
    aten.exp.default: "exp",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.square.default: "square",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
}


class ArithmeticToDialect(Pass):
    """Converts arithmetic to dialect ops; plain numbers become attributes and need no sharing.

    Before:
        %x = input : shared 2x4
        %y = input : shared 2x4
        %1 = aten.mul.Tensor(%x, 22.6)
        %2 = aten.add.Tensor(%1, %y)
        %3 = aten.softmax.int(%2, -1)
    After:
        %1 = mpc.scale(%x, 22.6)
        %2 = mpc.add(%1, %y)
        %3 = mpc.softmax(%2)
    """

    stage = "dialect"
    after = ("linear_to_dialect",)

    def run(self, graph_module: fx.GraphModule) -> int:
        return sum(
            self._rewrite(graph_module, node)
            for node in list(graph_module.graph.nodes)
            if node.op == "call_function" and is_shared(node)
        )

    def _rewrite(self, graph_module: fx.GraphModule, node: fx.Node) -> int:
        x: Any = node.args[0] if node.args else None
        if node.target in _BINARY and not node.kwargs:
            return self._binary(graph_module, node)
        if node.target in _UNARY:
            replace(node, target(_UNARY[node.target]), (node.args[0],))
        elif calls(node, aten.neg.default):
            replace(node, target("scale"), (node.args[0], -1.0))
        elif calls(node, aten.rsub.Scalar):
            operands: Any = (*node.args, 1)
            factor = -float(operands[2])
            turned = insert(node, target("scale"), (x, factor), node.meta["val"], Vis.SHARED)
            replace(node, target("shift"), (turned, float(operands[1])))
        elif (
            calls(node, aten.div.Tensor)
            and self._number(graph_module, node.args[1])
            and _same_shape(node.args[0], node)
        ):
            divisor = self._number(graph_module, node.args[1])
            replace(node, target("scale"), (node.args[0], 1.0 / divisor))  # type: ignore[operator]
        elif calls(node, aten.div.Tensor) and is_shared(node.args[1]):
            divisor_node: Any = node.args[1]
            inverse = insert(
                node, target("reciprocal"), (divisor_node,), divisor_node.meta["val"], Vis.SHARED
            )
            replace(node, target("mul"), (node.args[0], inverse))
        elif calls(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
            replace(node, target("square"), (node.args[0],))
        elif calls(node, aten.pow.Tensor_Scalar) and node.args[1] == 3:
            square = insert(node, target("square"), (x,), node.meta["val"], Vis.SHARED)
            replace(node, target("mul"), (square, x))
        elif calls(node, aten.softmax.int) and last_dim(node, node.args[1]):  # type: ignore[arg-type]
            replace(node, target("softmax"), (node.args[0],))
        elif calls(node, aten.matmul.default):
            replace(node, target("matmul"), node.args[:2])
        elif calls(node, aten.sum.dim_IntList, aten.mean.dim):
            return self._sum(node)
        else:
            return 0
        return 1

    def _binary(self, graph_module: fx.GraphModule, node: fx.Node) -> int:
        call: Any = node.target
        name = _BINARY[call]
        left, right = node.args
        for value, other, sign in ((left, right, 1.0), (right, left, -1.0)):
            number = self._number(graph_module, other)
            if number is None or not is_shared(value) or not _same_shape(value, node):
                continue
            if name == "mul":
                replace(node, target("scale"), (value, number))
            elif name == "add" or sign > 0:
                amount = number if name == "add" else -number
                replace(node, target("shift"), (value, amount))
            else:
                negated = insert(node, target("scale"), (value, -1.0), node.meta["val"], Vis.SHARED)
                replace(node, target("shift"), (negated, number))
            return 1
        replace(node, target(name), (left, right))
        return 1

    def _sum(self, node: fx.Node) -> int:
        x: Any = node.args[0]
        dims: Any = node.args[1]
        if len(dims) != 1 or not last_dim(x, dims[0]) or len(node.args) < 3 or not node.args[2]:
            self.skip(node, "it does not reduce the last dimension alone with keepdim=True")
            return 0
        if calls(node, aten.sum.dim_IntList):
            replace(node, target("sum"), (x,))
        else:
            total = insert(node, target("sum"), (x,), node.meta["val"], Vis.SHARED)
            replace(node, target("scale"), (total, 1.0 / x.meta["val"].shape[-1]))
        return 1

    @staticmethod
    def _number(graph_module: fx.GraphModule, value: Any) -> float | None:
        if isinstance(value, (int, float)):
            return float(value)
        tensor = constant(graph_module, value)
        public = tensor is not None and value.meta.get("vis") is Vis.PUBLIC
        return float(tensor) if public and tensor.numel() == 1 else None  # type: ignore[union-attr, arg-type]


def _same_shape(value: Any, node: fx.Node) -> bool:
    """Broadcasting with a one-element tensor may add dimensions; an attribute cannot."""
    return str(value.meta["val"].shape) == str(node.meta["val"].shape)
