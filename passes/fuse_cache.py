"""Recognize the concatenation that appends new keys and values to the cache."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, rank, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target


class FuseCache(Pass):
    """Fuses cache updates, so that each entry is opened under its mask once, when it is appended.

    Before:
        %key = input : shared 1x2xpastx8
        %new = input : shared 1x2xnewx8
        %1 = aten.cat.default([%key, %new], -2)
    After:
        %1 = mpc.cache_append(%key, %new)
    """

    stage = "fuse"

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if not calls(node, aten.cat.default) or len(node.args[0]) != 2:
                continue
            past, new = node.args[0]
            if past.op != "placeholder" or not is_shared(past):
                continue
            dim = node.args[1] if len(node.args) > 1 else 0
            if dim not in (-2, rank(node) - 2):
                self.skip(node, "the cache does not grow along its second-to-last dimension")
                continue
            replace(node, target("cache_append"), (past, new))
            sites += 1
        return sites
