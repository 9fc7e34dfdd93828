"""Merge consecutive linear layers by multiplying their matrices."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.ir import calls
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.weights import computable, insert_folded, uses, wide
from mergec.runtime.core.op import target


class MergeChains(Pass):
    """Rewrites V (W x + b) + c as (V W) x + (V b + c), where that is cheaper.

    Saves the truncation and the sending of the value in between: two rounds and 24 bytes per
    element. The product of the matrices must not have more elements than both together, because
    the local work, also the dealer's, and the bytes that open a matrix at the start of a session
    are proportional to it. So a projection through fewer features (a low-rank pair) stays as it is,
    and one through more features is merged.

    Before:
        %x = input : shared 1xnewx8
        %w = constant : server 8x8
        %b = constant : server 8
        %v = constant : server 8x8
        %1 = mpc.linear(%x, %w, %b)
        %2 = mpc.linear(%1, %v, None)
    After:
        %v_folded = constant : server 8x8
        %bias_folded = constant : server 8
        %2 = mpc.linear(%x, %v_folded, %bias_folded)
    """

    stage = "optimize"
    # These passes remove factors and gains between two layers.
    after = ("fold_norm_affine", "fold_scalars")

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for second in list(graph_module.graph.nodes):
            first: Any = second.args[0] if calls(second, target("linear")) else None
            if not calls(first, target("linear")):
                continue
            reason = _unfit(graph_module, first, second)
            if reason:
                self.skip(second, reason)
                continue
            self._merge(graph_module, first, second)
            sites += 1
        return sites

    def _merge(self, graph_module: fx.GraphModule, first: fx.Node, second: fx.Node) -> None:
        x, inner, before = _operands(first)
        _, outer, bias = _operands(second)
        known = self.info.constants
        matrix = wide(graph_module, outer) @ wide(graph_module, inner)
        if before is not None:
            moved = wide(graph_module, outer) @ wide(graph_module, before)
            origin, leaf = (outer, "bias") if bias is None else (bias, "")
            total = moved if bias is None else moved + wide(graph_module, bias)
            bias = insert_folded(graph_module, second, origin, total, known, leaf)
        merged = insert_folded(graph_module, second, outer, matrix, known)
        second.args = (x, merged, bias)


def _unfit(graph_module: fx.GraphModule, first: fx.Node, second: fx.Node) -> str:
    """Why two layers should not be merged; None if they should."""
    if len(first.users) > 1:
        return f"the result of %{first.name} is also used elsewhere"
    nodes = [node for linear in (first, second) for node in _operands(linear)[1:]]
    if not all(computable(graph_module, node) for node in nodes if node is not None):
        return "a matrix or bias is not a constant of 32 bits or more"
    matrices = [_operands(linear)[1] for linear in (first, second)]
    if any(len(uses(graph_module, weight)) > 1 for weight in matrices):
        return "a matrix is also used elsewhere, so it would be stored twice"
    (through, inputs), (outputs, _) = (weight.meta["val"].shape for weight in matrices)
    if outputs * inputs > through * (inputs + outputs):
        return f"the merged matrix would be larger than both: only {through} features in between"
    return ""


def _operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    return (*linear.args, None)[:3]  # type: ignore[return-value]
