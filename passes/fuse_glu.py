"""Recognize gated units: SwiGLU, GeGLU, ReGLU."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target


class FuseGlu(Pass):
    """Fuses a gate's activation and its product with `up` into one op; their openings share rounds.

    Before:
        %gate = input : shared 1xnewx8
        %up = input : shared 1xnewx8
        %1 = mpc.silu(%gate)
        %2 = aten.mul.Tensor(%1, %up)
    After:
        %2 = mpc.glu(%gate, %up, 'silu')
    """

    stage = "fuse"
    after = ("fuse_activations",)

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if not calls(node, aten.mul.Tensor) or not all(map(is_shared, node.args)):
                continue
            first, second = node.args
            for active, up in ((first, second), (second, first)):
                kind = _activation(active)
                if kind is None:
                    continue
                if str(active.meta["val"].shape) != str(up.meta["val"].shape):
                    self.skip(node, "the gate and the other factor differ in shape")
                    continue
                if len(active.users) > 1:
                    self.skip(node, "the activation is also used elsewhere")
                    continue
                replace(node, target("glu"), (active.args[0], up, kind))
                sites += 1
                break
        return sites


def _activation(node: Any) -> str | None:
    if calls(node, target("silu")):
        return "silu"
    if calls(node, target("relu")):
        return "relu"
    if calls(node, target("gelu")):
        return "gelu_tanh" if len(node.args) > 1 and node.args[1] else "gelu"
    return None
