"""Convert embedding lookups into `mpc.embedding`."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.ir import aten, calls, constant, is_public, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target


class EmbeddingToDialect(Pass):
    """Converts a lookup by the client's token ids in a table that the server holds.

    A lookup by public positions stays as it is: the server does it alone and sends nothing.

    Before:
        %ids = input : client int64 1xnew
        %table = constant : server 97x8
        %1 = aten.embedding.default(%table, %ids)
    After:
        %1 = mpc.embedding(%ids, %table)
    """

    stage = "dialect"

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if not calls(node, aten.embedding.default) or is_public(node):
                continue
            weight, ids = node.args[:2]
            if constant(graph_module, weight) is None:
                self.skip(node, "its table is computed at run time and is not a constant")
                continue
            replace(node, target("embedding"), (ids, weight))
            sites += 1
        return sites
