"""Replace SiLU by a quadratic polynomial."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.rewriting import Pass
from mergec.passes.quadratic_gelu import Coefficients, put_quadratic

SILU: Coefficients = (0.25, 0.5, 0.0)


class QuadraticSilu(Pass):
    """Replaces SiLU by 0.25 x**2 + 0.5 x, also in the gated units of newer decoders.

    Lossy. MPCFormer (Li et al., ICLR 2023, section 3.2) has a polynomial for GELU only; this is the
    Taylor polynomial of SiLU at zero, because most gates of a model that was not retrained are near
    zero. Its error is below 0.04 for |x| < 1 and grows as x**2 for negative x.

    Before:
        %x = input : shared 1xnewx8
        %gate = input : shared 1xnewx8
        %up = input : shared 1xnewx8
        %1 = mpc.silu(%x)
        %2 = mpc.glu(%gate, %up, 'silu')
    After:
        %1 = mpc.quadratic(%x, 0.25, 0.5, 0.0)
        %quadratic = mpc.quadratic(%gate, 0.25, 0.5, 0.0)
        %2 = aten.mul.Tensor(%quadratic, %up)
    """

    stage = "approximate"
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        return put_quadratic(graph_module, ("silu",), ("silu",), SILU)
