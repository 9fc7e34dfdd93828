"""Replace GELU by a quadratic polynomial."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.ir import aten, calls, insert, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis

Coefficients = tuple[float, float, float]

GELU: Coefficients = (0.125, 0.25, 0.5)


class QuadraticGelu(Pass):
    """Replaces GELU by 0.125 x**2 + 0.25 x + 0.5: one opening; a table of cubics takes four.

    Lossy. The polynomial is MPCFormer's (Li et al., ICLR 2023, section 3.2), which retrains its
    models with it; without retraining, the error of activations far from zero is as large as they
    are. A gated unit is split into the polynomial and the product.

    Before:
        %x = input : shared 1xnewx8
        %gate = input : shared 1xnewx8
        %up = input : shared 1xnewx8
        %1 = mpc.gelu(%x, True)
        %2 = mpc.glu(%gate, %up, 'gelu')
    After:
        %1 = mpc.quadratic(%x, 0.125, 0.25, 0.5)
        %quadratic = mpc.quadratic(%gate, 0.125, 0.25, 0.5)
        %2 = aten.mul.Tensor(%quadratic, %up)
    """

    stage = "approximate"
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        return put_quadratic(graph_module, ("gelu", "quick_gelu"), ("gelu", "gelu_tanh"), GELU)


def put_quadratic(
    graph_module: fx.GraphModule,
    ops: tuple[str, ...],
    gates: tuple[str, ...],
    coefficients: Coefficients,
) -> int:
    """Replace ops of the dialect, and gated units with one of `gates`; returns their number."""
    sites = 0
    for node in list(graph_module.graph.nodes):
        if calls(node, *map(target, ops)):
            replace(node, target("quadratic"), (node.args[0], *coefficients))
        elif calls(node, target("glu")) and node.args[2] in gates:
            gate, up, _ = node.args
            arguments = (gate, *coefficients)
            active = insert(node, target("quadratic"), arguments, node.meta["val"], Vis.SHARED)
            replace(node, aten.mul.Tensor, (active, up))
        else:
            continue
        sites += 1
    return sites
