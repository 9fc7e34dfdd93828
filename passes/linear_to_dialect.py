"""Convert products with a server-held matrix into `mpc.linear`."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, constant, is_shared, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_constant
from mergec.runtime.core.op import target


class LinearToDialect(Pass):
    """Converts products with a matrix of the server into `mpc.linear`.

    A matrix in the transposed layout (GPT-2's Conv1D) is transposed at compile time.

    Before:
        %x = input : shared 5x8
        %weight = constant : server 8x16
        %bias = constant : server 16
        %1 = aten.addmm.default(%bias, %x, %weight)
    After:
        %weight_turned = constant : server 16x8
        %1 = mpc.linear(%x, %weight_turned, %bias)
    """

    stage = "dialect"

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if calls(node, aten.linear.default) and is_shared(node.args[0]):
                x, weight, bias = (*node.args, None)[:3]
            elif calls(node, aten.addmm.default) and is_shared(node.args[1]):
                if node.kwargs:
                    self.skip(node, "its alpha or beta is not 1")
                    continue
                bias, x, weight = node.args
                weight = self._turned(graph_module, weight)
            elif calls(node, aten.matmul.default) and is_shared(node.args[0]):
                x, other = node.args
                bias, weight = None, self._second_factor(graph_module, other)
            else:
                continue
            if constant(graph_module, weight) is None:
                if not calls(node, aten.matmul.default):
                    self.skip(node, "its matrix is computed at run time and is not a constant")
                continue
            replace(node, target("linear"), (x, weight, bias))
            sites += 1
        return sites

    def _second_factor(self, graph_module: fx.GraphModule, node: Any) -> fx.Node | None:
        """A matrix by which `x @ node` is linear(x, matrix)."""
        if calls(node, aten.permute.default) and list(node.args[1]) == [1, 0]:
            return node.args[0]
        value = constant(graph_module, node)
        if value is not None and value.dim() == 2:
            return self._turned(graph_module, node)
        return None

    def _turned(self, graph_module: fx.GraphModule, node: Any) -> fx.Node | None:
        value = constant(graph_module, node)
        if value is None:
            return None
        name = f"{node.target}_turned"
        turned = insert_constant(graph_module, node.next, name, value.T.contiguous())
        turned.meta |= {"vis": node.meta["vis"], "module": node.meta.get("module", "")}
        self.info.constants[name] = node.meta["vis"]
        return turned
