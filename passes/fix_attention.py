"""Replace the attention weights by a constant table."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import add_constant, ancestors, aten, bind, calls, replace
from mergec.compiler.graph.ranges import replay
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call, length
from mergec.runtime.core.op import REGISTRY, target
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops.attention import Attention


class FixAttention(Pass):
    """Replaces attention weights by a table per head: no queries, keys, softmax or rounds.

    Lossy. This is the constant attention of MERGE (Liang et al., AAAI 2024). MERGE trains the
    table, as `mergec adapt` does; of a model that was not adapted it is the mean of its own
    attention weights over the calibration prompts, per head and pair of positions. Let P be the
    length of the longest prompt. Tokens after the P-th attend as the P-th does: to the same
    distances back, and to the first token, which takes the weight that a head has no use for. So
    the pass is exact up to P tokens for heads that attend by position alone; calibrate with prompts
    as long as those that you expect. Queries and keys are dropped, and with them rotary embeddings,
    relative position biases and the key cache. The table follows from the weights, so the server
    holds it, and its product with cached values costs no message.

    An encoder's tokens attend to both sides, by a whole table; its tokens after the P-th attend as
    in a decoder. Cross-attention gets a table by the position of the answer's token and that of the
    source's: answer tokens after the P-th attend as the P-th does, and source tokens after the P-th
    have no weight. There P is the length of the longest source or answer. As in MERGE, rows are not
    scaled to a sum of 1 for another length.

    Before:
        %ids = input : client int64 1xnew
        %key = input : shared 1x2xpastx4
        %value = input : shared 1x2xpastx4
        %table = constant : server 97x4
        %0 = mpc.embedding(%ids, %table)
        %x = aten.expand.default(%0, [2, -1, -1])
        %new = aten.unsqueeze.default(%x, 0)
        %1 = mpc.cache_append(%key, %new)
        %2 = mpc.cache_append(%value, %new)
        %attention = mpc.attention(%new, %1, %2, None, 0.5)
        return [%attention, %1, %2]
    After:
        %ids = input : client int64 1xnew
        %value = input : shared 1x2xpastx4
        %attention.table = constant : server 2x6x6
        %0 = mpc.embedding(%ids, %table)
        %x = aten.expand.default(%0, [2, -1, -1])
        %new = aten.unsqueeze.default(%x, 0)
        %2 = mpc.cache_append(%value, %new)
        %sym_size = aten.sym_size.int(%ids, 1)
        %attention = mpc.constant_attention(%2, %attention.table, %sym_size)
        return [%attention, %2]
    """

    stage = "approximate"
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        found = [n for n in graph_module.graph.nodes if calls(n, target("attention"))]
        if not found:
            return 0
        tables = {node: table for node in found if (table := self._trained(node)) is not None}
        rest = [node for node in found if node not in tables]
        if rest:
            tables |= _observe(graph_module, rest, self.info.inputs, self.info.calibration)
        lengths = _Lengths(graph_module, found[0])
        for node in found:
            table = tables[node].to(node.meta["val"].dtype)
            held = add_constant(node, self.info.constants, _name(node), table, Vis.SERVER)
            values = bind(REGISTRY["attention"], node)["v"]
            arguments = (values, held, *lengths.rows(node))
            replace(node, target("constant_attention"), arguments)
        graph_module.graph.eliminate_dead_code()
        self._drop_caches(graph_module)
        return len(found)

    def _trained(self, node: fx.Node) -> torch.Tensor | None:
        """The table that training determined for this attention, if it did."""
        heads = bind(REGISTRY["attention"], node)["q"].meta["val"].shape[1]
        return self.info.take(_name(node), (heads, None, None))

    def _drop_caches(self, graph_module: fx.GraphModule) -> None:
        """Remove caches that nothing reads any more; another one then supplies their length."""
        *_, output = graph_module.graph.nodes
        texts = sum(spec.vis is Vis.CLIENT for spec in self.info.inputs)
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        specs = self.info.inputs[texts:]
        logits, *results = output.args[0]
        own, cross = results[: len(specs)], results[len(specs) :]
        pairs = list(zip(placeholders[texts:], specs, own, strict=True))
        dropped = [pair for pair in pairs if _unread(pair[0], pair[2], output)]
        kept = [pair for pair in pairs if pair not in dropped]
        filled = [node for node in cross if not _idle(node, output)]
        if kept:
            output.args = ([logits, *(pair[2] for pair in kept), *filled],)
            for cache, spec, following in dropped:
                graph_module.graph.erase_node(following)
                _erase(cache, kept[0][0])
                self.info.inputs.remove(spec)
            for node in cross:
                if node not in filled:
                    _erase(node, filled[0])


class _Lengths:
    """Counts the rows of attentions, by nodes that are inserted before the first of them."""

    def __init__(self, graph_module: fx.GraphModule, first: fx.Node) -> None:
        self.first = first
        inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        *self.source, self.ids = [node for node in inputs if node.meta["vis"] is Vis.CLIENT]
        self.caches = inputs[1 + len(self.source) :]
        self._new: dict[fx.Node, Any] = {}
        self._end: Any = None

    def rows(self, node: fx.Node) -> tuple[Any, ...]:
        """What follows values and table in a call of `constant_attention`."""
        arguments = bind(REGISTRY["attention"], node)
        if not self.source or self.ids in ancestors(arguments["k"]):
            return (self._size(self.ids),)
        if self.ids not in ancestors(arguments["q"]):
            return self._size(self.source[0]), None, False
        new = self._size(self.ids)
        if self._end is None:
            self._end = new
            if self.caches:
                past = length(self.first, self.caches[0], 2)
                self._end = insert_call(self.first, operator.add, past, new)
        return new, self._end, False

    def _size(self, text: fx.Node) -> Any:
        if text not in self._new:
            self._new[text] = length(self.first, text, 1)
        return self._new[text]


def _erase(cache: fx.Node, other: fx.Node) -> None:
    """Erase a cache that is read for its length alone, which is that of the other one."""
    for size in list(cache.users):
        size.replace_input_with(cache, other)
    cache.graph.erase_node(cache)


def _name(node: fx.Node) -> str:
    return f"{node.meta.get('module') or node.name}.table"


def _unread(cache: fx.Node, following: fx.Node, output: fx.Node) -> bool:
    """Whether a cache is only appended to, and read for nothing but its number of tokens."""
    return set(following.users) == {output} and all(
        user is following or _counts(user) for user in cache.users
    )


def _idle(filled: fx.Node, output: fx.Node) -> bool:
    """The same for a cache of cross-attention."""
    return all(user is output or _counts(user) for user in filled.users)


def _counts(user: fx.Node) -> bool:
    return calls(user, aten.sym_size.int) and bool(user.args[1] == 2)


def _observe(
    graph_module: fx.GraphModule, nodes: list[fx.Node], inputs: Any, samples: Any
) -> dict[fx.Node, torch.Tensor]:
    """The mean attention weights [H, P, Q] of each node over the samples, each as a prompt.

    Each weight is the mean over the samples that have both of its tokens.
    """
    found = {node: _Mean() for node in nodes}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n in found:
                q, k, _, *rest = self.fetch_args_kwargs_from_env(n)[0]
                found[n].add(Attention.probabilities(q, k, *rest)[0].to(torch.float64))
            return super().run_node(n)

    replay(Observer(graph_module), inputs, samples)
    return {node: mean.value() for node, mean in found.items()}


class _Mean:
    """The mean of matrices [H, p, q] with a common corner: each entry over those that have it."""

    def __init__(self) -> None:
        self._sum = self._count = torch.zeros(1, 0, 0, dtype=torch.float64)

    def add(self, matrix: torch.Tensor) -> None:
        rows, columns = (
            max(a, b) for a, b in zip(matrix.shape[1:], self._sum.shape[1:], strict=True)
        )

        def padded(value: torch.Tensor) -> torch.Tensor:
            room = (0, columns - value.shape[2], 0, rows - value.shape[1])
            return torch.nn.functional.pad(value, room)

        self._sum = padded(self._sum) + padded(matrix)
        self._count = padded(self._count) + padded(torch.ones_like(matrix[:1]))

    def value(self) -> torch.Tensor:
        return self._sum / self._count.clamp(min=1)
