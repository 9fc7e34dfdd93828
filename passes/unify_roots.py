"""Rewrite all spellings of inverse square roots to one."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_public
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call


class UnifyRoots(Pass):
    """Rewrites a division by a square root as a product with `rsqrt`, which is a single protocol.

    Before:
        %x = input : shared 2x4
        %y = input : shared 2x4
        %1 = aten.sqrt.default(%x)
        %2 = aten.div.Tensor(%y, %1)
        %3 = aten.pow.Tensor_Scalar(%x, -0.5)
    After:
        %rsqrt = aten.rsqrt.default(%x)
        %mul = aten.mul.Tensor(%y, %rsqrt)
        %rsqrt.2 = aten.rsqrt.default(%x)
    """

    stage = "canonicalize"
    after = ("expand_composites", "unify_spellings")

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if is_public(node):
                continue
            root: Any = None
            if calls(node, aten.div.Tensor):
                root = _under_root(node.args[1])
            elif calls(node, aten.reciprocal.default):
                root = _under_root(node.args[0])
            elif calls(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5:
                root = node.args[0]
            if root is None:
                continue
            result = insert_call(node, aten.rsqrt.default, root)
            if calls(node, aten.div.Tensor):
                result = insert_call(node, aten.mul.Tensor, node.args[0], result)
            node.replace_all_uses_with(result)
            sites += 1
        return sites


def _under_root(node: Any) -> Any:
    """The operand of a square root of a secret; None for other nodes."""
    if is_public(node):
        return None
    if calls(node, aten.sqrt.default):
        return node.args[0]
    if calls(node, aten.pow.Tensor_Scalar) and node.args[1] == 0.5:
        return node.args[0]
    return None
