"""Move the scale of attention scores into the weights of the queries."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.factors import Absorber, scales_above, split_factor
from mergec.compiler.graph.ir import calls
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target


class FoldAttentionScale(Pass):
    """Scores of scaled queries are scaled; so the query projection, or its norm's gain, does it.

    Attention takes a power of two for nothing. Any other scale is a product of its own with each
    query: one more truncation, a round and 16 bytes an element. The weights take the part of it
    that is no power of two, a factor between 0.7 and 1.4, so that queries keep their size and with
    it their precision. Rotary embedding and the move to heads are linear and let it pass. A layer
    that makes keys and values too is scaled in the columns of the queries alone.

    Before:
        %x = input : shared 1x2xnewx8
        %k = input : shared 1x2xnewx8
        %weight = constant : server 8x8
        %bias = constant : server 8
        %1 = mpc.linear(%x, %weight, %bias)
        %2 = mpc.attention(%1, %k, %k, None, 0.35)
    After:
        %weight_folded = constant : server 8x8
        %bias_folded = constant : server 8
        %1 = mpc.linear(%x, %weight_folded, %bias_folded)
        %2 = mpc.attention(%1, %k, %k, None, 0.25)
    """

    stage = "optimize"
    # Where that one has moved a gain into the query projection, there is one weight to change.
    after = ("fold_norm_affine",)

    def run(self, graph_module: fx.GraphModule) -> int:
        return sum(self._fold(graph_module, node) for node in list(graph_module.graph.nodes))

    def _fold(self, graph_module: fx.GraphModule, node: fx.Node) -> int:
        if not calls(node, target("attention")):
            return 0
        query: Any = node.args[0]
        scales = scales_above(query)
        total = float(node.args[4])  # type: ignore[arg-type]
        for scale in scales:
            total *= float(scale.args[1])  # type: ignore[arg-type]
        if total == 0:
            return 0
        rest, power = split_factor(total)
        if rest == 1.0 and not scales:
            return 0
        if rest != 1.0:
            found = Absorber.find(graph_module, node, query)
            if isinstance(found, str):
                self.skip(node, found)
                return 0
            found.multiply(graph_module, rest, self.info.constants)
        for scale in scales:
            scale.replace_all_uses_with(scale.args[0])  # type: ignore[arg-type]
        node.update_arg(4, power)
        return 1
