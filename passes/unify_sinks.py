"""Write a sink of attention as one more score, however the model divides by its exponential."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, last_dim, rank, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call, length


class UnifySinks(Pass):
    """Turns a factor sigmoid(logsumexp(x) - sink) of softmax(x) v into one more score of x.

    softmax(x) has the denominator D = sum(exp(x)), and the factor is D / (D + exp(sink)). So the
    product has the denominator D + exp(sink), that of a softmax over x and the sink, whose own
    weight is dropped (granite_swa). No logarithm and no sigmoid has to be computed.

    Before:
        %x = input : shared 1x2xnewxnew
        %v = input : shared 1x2xnewx8
        %sinks = constant : server 1x2x1
        %weights = aten.softmax.int(%x, -1)
        %sums = aten.matmul.default(%weights, %v)
        %lse = aten.logsumexp.default(%x, [-1])
        %gap = aten.sub.Tensor(%lse, %sinks)
        %sigmoid = aten.sigmoid.default(%gap)
        %factor = aten.unsqueeze.default(%sigmoid, -1)
        %1 = aten.mul.Tensor(%sums, %factor)
    After:
        %unsqueeze = aten.unsqueeze.default(%sinks, -1)
        %sym_size = aten.sym_size.int(%x, 2)
        %expand = aten.expand.default(%unsqueeze, [1, 2, %sym_size, 1])
        %cat = aten.cat.default([%x, %expand], -1)
        %softmax = aten.softmax.int(%cat, -1)
        %slice = aten.slice.Tensor(%softmax, 3, 0, -1)
        %1 = aten.matmul.default(%slice, %v)
    """

    stage = "canonicalize"
    # Casts between the calls are gone then, and a view is a reshape.
    after = ("unify_spellings",)

    def run(self, graph_module: fx.GraphModule) -> int:
        found = [n for n in graph_module.graph.nodes if calls(n, aten.mul.Tensor) and is_shared(n)]
        return sum(map(self._unify, found))

    def _unify(self, node: fx.Node) -> int:
        operands: tuple[Any, ...] = node.args
        for sums, factor in (operands, operands[::-1]):
            gap = _gap(factor)
            if gap is None or not calls(sums, aten.matmul.default):
                continue
            lse, sinks = gap
            softmax, values = sums.args
            if not calls(softmax, aten.softmax.int) or softmax.args[0] is not lse.args[0]:
                self.skip(node, "its factor is not of the scores whose softmax it scales")
                return 0
            if not last_dim(softmax, softmax.args[1]) or not last_dim(softmax, lse.args[1][0]):
                self.skip(node, "its softmax or its sum is not over the last dimension")
                return 0
            replace(node, aten.matmul.default, (_with_sinks(node, softmax.args[0], sinks), values))
            return 1
        return 0


def _gap(factor: Any) -> tuple[Any, Any] | None:
    """logsumexp and sinks of unsqueeze(sigmoid(logsumexp(x, [d]) - sinks), -1); None for others."""
    if not calls(factor, aten.unsqueeze.default) or not last_dim(factor, factor.args[1]):
        return None
    sigmoid = factor.args[0]
    gap: Any = sigmoid.args[0] if calls(sigmoid, aten.sigmoid.default) else None
    if not calls(gap, aten.sub.Tensor) or gap.kwargs:
        return None
    lse, sinks = gap.args
    # With keepdim there is one argument more.
    plain = calls(lse, aten.logsumexp.default) and len(lse.args) == 2 and len(lse.args[1]) == 1
    known = isinstance(sinks, fx.Node) and not is_shared(sinks)
    # Sinks that broadcast the other way would make several results out of one.
    same = _sizes(gap) == _sizes(lse)
    return (lse, sinks) if plain and known and same else None


def _sizes(node: Any) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _with_sinks(before: fx.Node, scores: fx.Node, sinks: fx.Node) -> fx.Node:
    """The softmax over scores [..., N, L] and sinks that broadcast to [..., N], without theirs."""
    own = insert_call(before, aten.unsqueeze.default, sinks, -1)
    sizes = [length(before, scores, dim) for dim in range(rank(scores) - 1)]
    own = insert_call(before, aten.expand.default, own, [*sizes, 1])
    whole = insert_call(before, aten.cat.default, [scores, own], -1)
    weights = insert_call(before, aten.softmax.int, whole, -1)
    return insert_call(before, aten.slice.Tensor, weights, rank(scores) - 1, 0, -1)
