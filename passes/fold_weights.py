"""Compute at compile time what the server would compute from its weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import constant
from mergec.compiler.graph.moves import is_move
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.weights import evaluate, insert_folded, pure
from mergec.runtime.core.spec import Vis


class FoldWeights(Pass):
    """Replaces a function of weights by a weight, which is opened under a mask once per session.

    An example is a norm's gain that a model stores minus one (nemotron), if no fusion absorbed it.
    Ops that only move data stay: a transposed matrix would be stored twice.

    Before:
        %x = input : shared 1xnewx8
        %weight = constant : server 8
        %bias = constant : server 8
        %1 = aten.add.Tensor(%weight, 1.0)
        %2 = mpc.layer_norm(%x, %1, %bias, 1e-05)
    After:
        %weight_folded = constant : server 8
        %2 = mpc.layer_norm(%x, %weight_folded, %bias, 1e-05)
    """

    stage = "dialect"

    def run(self, graph_module: fx.GraphModule) -> int:
        known: dict[fx.Node, fx.Node | None] = {}
        computed: set[fx.Node] = set()
        for node in graph_module.graph.nodes:
            if constant(graph_module, node) is not None:
                known[node] = node if node.meta["vis"] is Vis.SERVER else None
            elif pure(node) and all(operand in known for operand in node.all_input_nodes):
                weights = (known[operand] for operand in node.all_input_nodes)
                known[node] = next(filter(None, weights), None)
                if not is_move(node) or computed.intersection(node.all_input_nodes):
                    computed.add(node)
        sites = 0
        for node, origin in known.items():
            wanted = any(user not in known for user in node.users)
            if node not in computed or origin is None or not wanted:
                continue
            value = _value(graph_module, node)
            if isinstance(value, torch.Tensor):
                folded = insert_folded(graph_module, node, origin, value, self.info.constants)
                node.replace_all_uses_with(folded)
                sites += 1
        return sites


def _value(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    held = constant(graph_module, node)
    if held is not None:
        return held
    return evaluate(node, lambda operand: _value(graph_module, operand))
