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
    entries have no weight, and no row can sum to zero; see `mpc.ratio_attention`. A bias that the
    server adds to the scores, such as that of T5's relative positions, stays a part of them.

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
        if calls(node, target("attention")):
            given = bind(REGISTRY["attention"], node)
            if given["sink"] is not None:
                rewrite.skip(node, "it has a sink, which stands for an exponential")
                continue
            arguments = [*node.args[:5], float(given["softcap"]), kind]
            if given["bias"] is not None:
                arguments += [0.0, given["bias"]]
            replace(node, target("ratio_attention"), tuple(arguments))
            sites += 1
        elif calls(node, aten.softmax.int, aten._softmax.default) and is_shared(node):
            rewrite.skip(node, "it was not recognized as part of an attention")
    return sites
