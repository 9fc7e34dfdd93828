"""Recognize torch's LayerNorm."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target


class FuseLayerNorm(Pass):
    """Converts torch's layer_norm into one op that opens its row once.

    Before:
        %x = input : shared 1xnewx8
        %weight = constant : server 8
        %bias = constant : server 8
        %1 = aten.layer_norm.default(%x, [8], %weight, %bias, 1e-05)
    After:
        %1 = mpc.layer_norm(%x, %weight, %bias, 1e-05)
    """

    stage = "fuse"

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if not calls(node, aten.layer_norm.default) or not is_shared(node.args[0]):
                continue
            x, shape, weight, bias, eps = (
                *node.args[:5],
                *(None, None, 1e-5)[len(node.args) - 2 :],
            )[:5]
            if len(shape) != 1:
                self.skip(node, "it normalizes over several dimensions")
                continue
            replace(node, target("layer_norm"), (x, weight, bias, float(eps)))
            sites += 1
        return sites
