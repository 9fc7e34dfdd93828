"""Put rectified scores in the place of the exponentials of attention."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.rewriting import Pass
from mergec.passes.softmax_2quad import put_ratio


class Softmax2relu(Pass):
    """softmax(x) becomes relu(x) / sum: one comparison a score, and no maximum of the row.

    Lossy. After Mohassel and Zhang (SecureML, IEEE S&P 2017, section 5.3) and the 2ReLU of
    MPCFormer (Li et al., ICLR 2023). Scores below zero are not seen at all. THE-X (Chen et al.,
    Findings of ACL 2022) rectifies scores, too, but multiplies them with what a small network makes
    of their sum, as its homomorphic encryption cannot divide. That network is trained for each
    model and is dropped here: the sum is inverted as it is. A row without a score above zero gets
    the plain mean, and masked entries weigh nothing; see `mpc.ratio_attention`.

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
    # Where both are asked for, 2Quad comes first and leaves nothing.
    after = ("softmax_2quad",)
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        return put_ratio(self, graph_module, "2relu")
