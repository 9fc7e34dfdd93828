"""Replace the exponentials of attention by squares."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.ir import aten, bind, calls, is_shared, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import REGISTRY, target


class Softmax2quad(Pass):
    """Replaces softmax(x) by (x + 5)**2 / sum, which needs neither a maximum nor an exponential.

    Lossy. This is the 2Quad of MPCFormer (Li et al., ICLR 2023, section 3.2), which retrains its
    models with it: scores below -5 gain weight again, where softmax gives them almost none. Masked
    entries have no weight, and no row can sum to zero; see `mpc.ratio_attention`.

    Before:
        %q = input : shared 1x2xnewx8
        %k = input : shared 1x2xnewx8
        %v = input : shared 1x2xnewx8
        %mask = input : public 1x1xnewxnew
        %1 = mpc.attention(%q, %k, %v, %mask, 0.125)
    After:
        %1 = mpc.ratio_attention(%q, %k, %v, %mask, 0.125, 0.0, '2quad')
    """

    stage = "approximate"
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        return put_ratio(self, graph_module, "2quad")


def put_ratio(rewrite: Pass, graph_module: fx.GraphModule, kind: str) -> int:
    """Replace each attention by a ratio of this kind; returns their number."""
    sites = 0
    for node in list(graph_module.graph.nodes):
        if calls(node, target("attention")) and bind(REGISTRY["attention"], node)["bias"]:
            rewrite.skip(node, "the server adds a bias to its scores")
        elif calls(node, target("attention")):
            replace(node, target("ratio_attention"), (*node.args[:5], _softcap(node), kind))
            sites += 1
        elif calls(node, aten.softmax.int, aten._softmax.default) and is_shared(node):
            rewrite.skip(node, "it was not recognized as part of an attention")
    return sites


def _softcap(node: fx.Node) -> float:
    return float(node.args[5]) if len(node.args) > 5 else 0.0  # type: ignore[arg-type]
