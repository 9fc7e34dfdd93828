"""Replace the exponentials of attention by rectified scores."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.rewriting import Pass
from mergec.passes.softmax_2quad import put_ratio


class Softmax2relu(Pass):
    """Replaces softmax(x) by relu(x) / sum: one comparison per score, and no maximum of the row.

    Lossy. After Mohassel and Zhang (SecureML, IEEE S&P 2017, section 5.3) and the 2ReLU of
    MPCFormer (Li et al., ICLR 2023). Scores below zero are ignored. THE-X (Chen et al., Findings of
    ACL 2022) rectifies scores too, but its homomorphic encryption cannot divide, so it multiplies
    them by the output of a small network on their sum. That network is trained for each model and
    is dropped here: the sum itself is inverted. A row without a score above zero gets the plain
    mean, and masked entries have no weight; see `mpc.ratio_attention`.

    Before:
        %q = input : shared 1x2xnewx8
        %k = input : shared 1x2xnewx8
        %v = input : shared 1x2xnewx8
        %mask = input : public 1x1xnewxnew
        %1 = mpc.attention(%q, %k, %v, %mask, 0.125)
    After:
        %1 = mpc.ratio_attention(%q, %k, %v, %mask, 0.125, 0.0, '2relu')
    """

    stage = "approximate"
    # If both are enabled, 2Quad comes first and replaces every softmax.
    after = ("softmax_2quad",)
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        return put_ratio(self, graph_module, "2relu")
