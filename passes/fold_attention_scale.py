"""Move the scale of attention scores into the weights of the queries."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.factors import Absorber, scales_above, split_factor
from mergec.compiler.graph.ir import calls
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target


class FoldAttentionScale(Pass):
    """Moves the scale of attention scores into the query projection, or into its norm's gain.

    Scaling the queries scales the scores. Attention applies a power of two for free. Any other
    scale needs a separate product with each query: one more truncation, which costs a round and 16
    bytes per element. So the weights take the part of the scale that is not a power of two, a
    factor between 0.7 and 1.4. The queries then keep their magnitude and therefore their
    precision. Rotary embedding and the split into heads are linear, so the factor can move past
    them. In a layer that also computes keys and values, only the columns of the queries are scaled.

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
    # After it has moved a norm's gain into the query projection, only one weight has to change.
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
