"""Replace GELU and SiLU by ReLU."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.ir import calls, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target

_OPS = ("gelu", "quick_gelu", "silu")
_GATES = ("gelu", "gelu_tanh", "silu")


class ReluActivations(Pass):
    """Replaces GELU and SiLU by ReLU: one comparison with zero and no table.

    Lossy. THE-X (Chen et al., Findings of ACL 2022, section 3) does this for GELU and retrains the
    model; it does not cover SiLU. SiLU differs from ReLU by at most 0.28, GELU by 0.17.

    Before:
        %x = input : shared 1xnewx8
        %gate = input : shared 1xnewx8
        %up = input : shared 1xnewx8
        %1 = mpc.gelu(%x, True)
        %2 = mpc.glu(%gate, %up, 'silu')
    After:
        %1 = mpc.relu(%x)
        %2 = mpc.glu(%gate, %up, 'relu')
    """

    stage = "approximate"
    # If both are enabled, the polynomials come first and replace all activations.
    after = ("quadratic_gelu", "quadratic_silu")
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if calls(node, *map(target, _OPS)):
                replace(node, target("relu"), (node.args[0],))
            elif calls(node, target("glu")) and node.args[2] in _GATES:
                replace(node, target("glu"), (*node.args[:2], "relu"))
            else:
                continue
            sites += 1
        return sites
