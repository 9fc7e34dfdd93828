"""Move numeric factors into the weights of the preceding layer."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.factors import Absorber, split_factor
from mergec.compiler.graph.ir import calls
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target


class FoldScalars(Pass):
    """Rewrites linear(x, W, b) * 0.3 as linear(x, 0.3 W, 0.3 b), and embeddings in the same way.

    A factor that is not a power of two needs a truncated operand, and its result is truncated
    again: up to two rounds and 32 bytes per element. Powers of two are free where they are. A table
    that is also the head's matrix (gemma) stays: its scaled copy would be one more matrix to open
    at the start of a session, and an embedding needs no truncation before a factor.

    Before:
        %x = input : shared 1xnewx8
        %weight = constant : server 16x8
        %1 = mpc.linear(%x, %weight, None)
        %2 = mpc.scale(%1, 0.22)
    After:
        %weight_folded = constant : server 16x8
        %1 = mpc.linear(%x, %weight_folded, None)
    """

    stage = "optimize"
    # That pass splits the scale of queries between their weights and the scores, which is better.
    after = ("fold_attention_scale",)

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if not calls(node, target("scale")):
                continue
            operand: Any = node.args[0]
            factor: Any = node.args[1]
            if factor == 0 or abs(split_factor(factor)[0]) == 1.0:
                continue
            found = Absorber.find(graph_module, node, operand)
            if isinstance(found, str):
                self.skip(node, found)
                continue
            found.multiply(graph_module, factor, self.info.constants)
            node.replace_all_uses_with(operand)
            # A dead user would keep the next factor from being folded.
            graph_module.graph.erase_node(node)
            sites += 1
        return sites
