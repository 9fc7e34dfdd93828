"""Rewrite functions without a protocol in terms of functions that have one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_public, is_shared, rank
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call, insert_constant, length
from mergec.runtime.core.spec import Vis


class ExpandComposites(Pass):
    """Rewrites functions without a protocol by exact identities, so they need no op of their own.

    Before:
        %x = input : shared 3x3
        %mask = constant : public bool 3x3
        %1 = aten.clamp.default(%x, -8.0, 8.0)
        %2 = aten.masked_fill.Scalar(%1, %mask, -inf)
    After:
        %_filling_1 = constant -inf : public scalar
        %sub = aten.sub.Tensor(%x, -8.0)
        %relu = aten.relu.default(%sub)
        %sub.2 = aten.sub.Tensor(%x, 8.0)
        %relu.2 = aten.relu.default(%sub.2)
        %sub.3 = aten.sub.Tensor(%relu, %relu.2)
        %add = aten.add.Tensor(%sub.3, -8.0)
        %logical_not = aten.logical_not.default(%mask)
        %where = aten.where.self(%logical_not, %add, %_filling_1)
    """

    stage = "canonicalize"
    after = ("publish_masks", "remove_noops")

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if node.op != "call_function" or is_public(node):
                continue
            if calls(node, aten.masked_fill.Scalar, aten.masked_fill_.Scalar):
                sites += self._masked_fill(graph_module, node)
            elif calls(node, aten.unbind.int):
                sites += self._unbind(node)
            elif node.target in _RULES:
                result = _RULES[node.target](node, *node.args, **node.kwargs)
                if result is None:
                    self.skip(node, "no rule covers its options")
                    continue
                _put(node, result)
                sites += 1
        return sites

    def _masked_fill(self, graph_module: fx.GraphModule, node: fx.Node) -> int:
        x, mask, value = node.args
        if not is_shared(x) or not is_public(mask):
            self.skip(node, "its mask is secret; register it with persistent=False")
            return 0
        name = f"_filling_{len(self.info.constants)}"
        low = torch.tensor(value, dtype=node.meta["val"].dtype)
        self.info.constants[name] = Vis.PUBLIC
        kept = insert_call(node, aten.logical_not.default, mask)
        filling = insert_constant(graph_module, node, name, low)
        _put(node, insert_call(node, aten.where.self, kept, x, filling))
        return 1

    def _unbind(self, node: fx.Node) -> int:
        if not all(calls(user, operator.getitem) for user in node.users):
            self.skip(node, "its pieces are not selected one by one")
            return 0
        x, dim = (*node.args, 0)[:2]
        for user in list(node.users):
            piece = insert_call(user, aten.select.int, x, dim, user.args[1])
            user.replace_all_uses_with(piece)
        return 1


def _put(node: fx.Node, result: fx.Node) -> None:
    """Replace and erase a node; dead-code removal would keep one that writes in place."""
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _swap_last(node: fx.Node, x: fx.Node) -> fx.Node:
    order = [*range(rank(x) - 2), rank(x) - 1, rank(x) - 2]
    return insert_call(node, aten.permute.default, x, order)


def _expand_as(node: fx.Node, x: fx.Node, other: fx.Node) -> fx.Node:
    sizes = [length(node, other, dim) for dim in range(rank(other))]
    return insert_call(node, aten.expand.default, x, sizes)


def _broadcast_to(node: fx.Node, x: fx.Node, sizes: list[Any]) -> fx.Node:
    return insert_call(node, aten.expand.default, x, sizes)


def _square(node: fx.Node, x: fx.Node) -> fx.Node:
    return insert_call(node, aten.pow.Tensor_Scalar, x, 2)


def _clamp(node: fx.Node, x: fx.Node, low: Any = None, high: Any = None) -> fx.Node | None:
    """low + relu(x - low) - relu(x - high)."""
    if not all(isinstance(bound, (int, float, type(None))) for bound in (low, high)):
        return None
    if low is None:
        excess = _relu(node, insert_call(node, aten.sub.Tensor, x, high))
        return insert_call(node, aten.sub.Tensor, x, excess)
    above = _relu(node, insert_call(node, aten.sub.Tensor, x, low) if low else x)
    if high is not None:
        excess = _relu(node, insert_call(node, aten.sub.Tensor, x, high))
        above = insert_call(node, aten.sub.Tensor, above, excess)
    return insert_call(node, aten.add.Tensor, above, low) if low else above


def _relu(node: fx.Node, x: fx.Node) -> fx.Node:
    return insert_call(node, aten.relu.default, x)


def _leaky_relu(node: fx.Node, x: fx.Node, slope: float = 0.01) -> fx.Node:
    bent = insert_call(node, aten.mul.Tensor, _relu(node, x), 1.0 - slope)
    return insert_call(node, aten.add.Tensor, bent, insert_call(node, aten.mul.Tensor, x, slope))


def _hard_sigmoid(node: fx.Node, x: fx.Node) -> Any:
    shifted = insert_call(node, aten.add.Tensor, x, 3.0)
    return insert_call(node, aten.div.Tensor, _clamp(node, shifted, 0.0, 6.0), 6.0)


def _hard_swish(node: fx.Node, x: fx.Node) -> Any:
    return insert_call(node, aten.mul.Tensor, x, _hard_sigmoid(node, x))


def _elu(
    node: fx.Node, x: fx.Node, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> fx.Node | None:
    """relu(x) + alpha (exp(min(x, 0)) - 1)."""
    if (scale, input_scale) != (1.0, 1.0):
        return None
    negative = insert_call(node, aten.exp.default, _clamp(node, x, None, 0.0))
    curved = insert_call(node, aten.mul.Tensor, negative, alpha)
    curved = insert_call(node, aten.sub.Tensor, curved, alpha)
    return insert_call(node, aten.add.Tensor, _relu(node, x), curved)


def _glu(node: fx.Node, x: fx.Node, dim: int = -1) -> fx.Node | None:
    size = x.meta["val"].shape[dim]
    if not isinstance(size, int):
        return None
    value, gate = (
        insert_call(node, aten.slice.Tensor, x, dim, start, start + size // 2)
        for start in (0, size // 2)
    )
    return insert_call(node, aten.mul.Tensor, value, insert_call(node, aten.sigmoid.default, gate))


def _variance(
    node: fx.Node, x: fx.Node, dims: Any = None, correction: Any = 1, keepdim: bool = False
) -> fx.Node | None:
    """mean((x - mean(x))²), times n / (n - correction)."""
    size = x.meta["val"].shape[-1]
    over_last = isinstance(dims, (list, tuple)) and [d % rank(x) for d in dims] == [rank(x) - 1]
    if not over_last or not isinstance(size, int):
        return None
    mean = insert_call(node, aten.mean.dim, x, [-1], True)
    centred = insert_call(node, aten.sub.Tensor, x, mean)
    square = insert_call(node, aten.pow.Tensor_Scalar, centred, 2)
    result = insert_call(node, aten.mean.dim, square, [-1], keepdim)
    freedom = size - int(1 if correction is None else correction)
    return result if freedom == size else insert_call(node, aten.mul.Tensor, result, size / freedom)


_RULES: dict[Any, Callable[..., fx.Node | None]] = {
    aten.mT.default: _swap_last,
    aten.expand_as.default: _expand_as,
    aten.broadcast_to.default: _broadcast_to,
    aten.square.default: _square,
    aten.clamp.default: _clamp,
    aten.clamp_.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda node, x, high: _clamp(node, x, None, high),
    aten.hardtanh.default: lambda node, x, low=-1.0, high=1.0: _clamp(node, x, low, high),
    aten.relu6.default: lambda node, x: _clamp(node, x, 0.0, 6.0),
    aten.leaky_relu.default: _leaky_relu,
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.hardswish.default: _hard_swish,
    aten.elu.default: _elu,
    aten.glu.default: _glu,
    aten.var.correction: _variance,
    aten.var.dim: _variance,
}
