"""Evaluate public values that do not depend on lengths at compile time."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import constant, is_public
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.weights import evaluate, insert_evaluated, pure
from mergec.runtime.core.spec import Vis

LARGEST = 1 << 16
"""Most elements of a folded constant; a larger one is cheaper to recompute than to store."""


class FoldPublic(Pass):
    """Folds public values such as rotary frequencies, scales and fill values into constants.

    Values that depend on the lengths of a step stay in the graph.

    Before:
        %x = input : shared newx4
        %positions = input : public new
        %1 = aten.arange.start_step(0, 64, 16)
        %2 = aten.div.Tensor(%1, 64)
        %3 = aten.pow.Scalar(10000.0, %2)
        %4 = aten.outer.default(%positions, %3)
        %5 = aten.mul.Tensor(%x, %4)
    After:
        %_folded_0 = constant : public float32 4
        %4 = aten.outer.default(%positions, %_folded_0)
        %5 = aten.mul.Tensor(%x, %4)
    """

    stage = "canonicalize"
    after = ("expand_composites", "expand_sdpa", "publish_masks", "unify_spellings")

    def run(self, graph_module: fx.GraphModule) -> int:
        values: dict[fx.Node, Any] = {}
        for node in graph_module.graph.nodes:
            if node.op == "get_attr" and is_public(node):
                value = constant(graph_module, node)
                if value is not None:
                    values[node] = value
            elif (
                is_public(node)
                and pure(node)
                and all(operand in values for operand in node.all_input_nodes)
            ):
                values[node] = evaluate(node, values.__getitem__)
        sites = 0
        for node, value in values.items():
            if node.op == "get_attr" or not isinstance(value, torch.Tensor):
                continue
            if all(user in values for user in node.users):
                continue
            if value.numel() > LARGEST:
                self.skip(node, f"its value is too large to store: {value.numel()} elements")
                continue
            known = self.info.constants
            folded = insert_evaluated(graph_module, node, "_folded", value, Vis.PUBLIC, known)
            node.replace_all_uses_with(folded)
            sites += 1
        return sites
