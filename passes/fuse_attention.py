"""Recognize attention: scores, mask, softmax and the weighted sum of values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import (
    aten,
    calls,
    insert,
    is_public,
    is_shared,
    last_dim,
    rank,
    replace,
)
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis
from mergec.runtime.protocols.rows import PAIRS

_LOW = -1e4
"""A score that means "masked": its exponential is 0 relative to that of any visible score."""


class FuseAttention(Pass):
    """Fuses attention into one op on opened keys and values; grouped queries stay grouped.

    Scores may be scaled at any point, capped by a tanh (gemma2), and masked by additions (most
    models), by a selection (gpt_neo) or with ALiBi in a fused product (bloom). The server may add a
    bias that it holds (t5). Each row may end with a score of no key, a sink, whose weight is
    dropped (gpt_oss). Keys and values may be repeated for each group of queries.

    Before:
        %q = input : shared 1x2xnewx8
        %k = input : shared 1x2xnewx8
        %v = input : shared 1x2xnewx8
        %mask = input : public 1x1xnewxnew
        %1 = aten.permute.default(%k, [0, 1, 3, 2])
        %2 = aten.matmul.default(%q, %1)
        %3 = aten.mul.Tensor(%2, 0.125)
        %4 = aten.add.Tensor(%3, %mask)
        %5 = aten.softmax.int(%4, -1)
        %6 = aten.matmul.default(%5, %v)
    After:
        %6 = mpc.attention(%q, %k, %v, %mask, 0.125, 0.0)
    """

    stage = "fuse"

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if calls(node, aten.softmax.int, aten._softmax.default) and is_shared(node):
                sites += self._fuse(node)
        return sites

    def _fuse(self, softmax: fx.Node) -> int:
        if not last_dim(softmax, softmax.args[1]):  # type: ignore[arg-type]
            self.skip(softmax, "it is not over the last dimension")
            return 0
        scores = _Scores(softmax)
        first, sink = _without_sink(softmax.args[0])
        reason = scores.walk(first)
        if reason:
            self.skip(softmax, reason)
            return 0
        weights = softmax if sink is None else _kept(softmax)
        if weights is None:
            self.skip(softmax, "its last weight, that of a sink, is not dropped")
            return 0
        product = _weighted_sum(weights)
        if product is None:
            self.skip(softmax, "its result is used for more than one weighted sum")
            return 0
        query, keys = scores.query, scores.keys
        values: Any = product.args[1]
        flat = rank(product) == 3
        if flat and sink is not None:
            self.skip(softmax, "it has a sink, and heads that are part of the batch dimension")
            return 0
        if _heads_apart(query, keys, values):
            query, keys = (_unsqueeze(product, t) for t in (query, keys))
        if len({rank(t) for t in (query, keys, values)}) > 1:
            self.skip(softmax, "heads are a dimension of the scores but not of the weighted sum")
            return 0
        if flat:
            # Heads are part of the batch dimension (bloom): split them off.
            query, keys, values = (_unsqueeze(product, t) for t in (query, keys, values))
        keys, values = _ungroup(keys), _ungroup(values)
        mask, bias = (scores.sum_of(vis, product, flat) for vis in (Vis.PUBLIC, Vis.SERVER))
        arguments: Any = (query, keys, values, mask, scores.scale, scores.cap)
        if sink is not None:
            arguments += (PAIRS, bias, 0, None, sink)
        elif bias is not None:
            arguments += (PAIRS, bias)
        if flat:
            val = product.meta["val"].unsqueeze(0)
            whole = insert(product, target("attention"), arguments, val, Vis.SHARED)
            replace(product, aten.select.int, (whole, 0, 0))
        else:
            replace(product, target("attention"), arguments)
        return 1


@dataclass
class _Scores:
    """The path from the softmax back to the product of queries and keys."""

    softmax: fx.Node
    scale: float = 1.0
    cap: float = 0.0
    terms: list[tuple[fx.Node, float]] = field(default_factory=list)
    query: Any = None
    keys: Any = None
    _masked: list[fx.Node] = field(default_factory=list)

    def walk(self, node: Any) -> str | None:
        """Follow the scores upwards; returns the reason if that fails."""
        while True:
            if calls(node, aten.matmul.default):
                return self._product(node.args[0], node.args[1])
            if calls(node, aten.baddbmm.default):
                beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
                self.terms.append((node.args[0], self.scale * beta))
                self.scale *= alpha
                return self._product(node.args[1], node.args[2])
            if calls(node, aten.reshape.default) and _same_rows(node):
                node = node.args[0]
            elif calls(node, aten.add.Tensor) and self._open() and _known_term(node) is not None:
                secret, term = _known_term(node)  # type: ignore[misc]
                self.terms.append((term, self.scale))
                node = secret
            elif calls(node, aten.max.other, aten.maximum.default) and _keeps(node):
                node = node.args[0]
            elif calls(node, aten.where.self) and self._open() and _hides(node):
                self._masked.append(node)
                node = node.args[1]
            elif calls(node, aten.mul.Tensor) and calls(node.args[0], aten.tanh.default):
                inner = node.args[0].args[0]
                if not calls(inner, aten.div.Tensor) or inner.args[1] != node.args[1]:
                    return "a tanh of the scores is not a softcap"
                if self.scale != 1.0:
                    return "the capped scores are scaled"
                self.cap = float(node.args[1])
                node = inner.args[0]
            elif calls(node, aten.mul.Tensor) and _number(node.args[1]) is not None:
                self.scale *= _number(node.args[1])  # type: ignore[operator]
                node = node.args[0]
            elif calls(node, aten.div.Tensor) and _number(node.args[1]) is not None:
                self.scale /= _number(node.args[1])  # type: ignore[operator]
                node = node.args[0]
            else:
                return f"the scores come from {getattr(node, 'target', node)}"

    def _open(self) -> bool:
        """Whether no softcap was met yet: a term from below one would have to pass through it."""
        return self.cap == 0.0

    def _product(self, query: Any, turned: Any) -> str | None:
        if not calls(turned, aten.permute.default) or not is_shared(query):
            return "the keys are not transposed"
        order = list(range(rank(turned)))
        order[-1], order[-2] = order[-2], order[-1]
        if [d % len(order) for d in turned.args[1]] != order:
            return "the keys are not transposed in their last two dimensions"
        self.query, self.keys = query, turned.args[0]
        return None

    def sum_of(self, vis: Vis, before: fx.Node, flat: bool) -> fx.Node | None:
        """The sum of all terms of a visibility that are added to the scores, as one tensor."""
        total: Any = None
        terms: list[tuple[Any, float]] = [t for t in self.terms if t[0].meta["vis"] is vis]
        for choice in self._masked if vis is Vis.PUBLIC else ():
            shown, _, low = choice.args
            terms.append((insert_call(before, aten.where.ScalarSelf, shown, 0.0, low), 1.0))
        for term, factor in terms:
            if factor != 1.0:
                term = insert_call(before, aten.mul.Tensor, term, factor)
            if flat and rank(term) == 3:
                term = insert_call(before, aten.unsqueeze.default, term, 0)
            total = term if total is None else insert_call(before, aten.add.Tensor, total, term)
        return total


def _same_rows(reshape: fx.Node) -> bool:
    """Whether a reshape keeps each row of scores whole, in its place within its head."""
    source: Any = reshape.args[0]
    return [str(s) for s in source.meta["val"].shape[-2:]] == [
        str(s) for s in reshape.meta["val"].shape[-2:]
    ]


def _known_term(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The secret addend, and the one that is public or held by the server."""
    for secret, term in (node.args, node.args[::-1]):
        known = isinstance(term, fx.Node) and term.meta["vis"] in (Vis.PUBLIC, Vis.SERVER)
        if is_shared(secret) and known:
            return secret, term  # type: ignore[return-value]
    return None


def _hides(choice: fx.Node) -> bool:
    """Whether the scores that are not selected become so low that their softmax is 0."""
    low = _number(choice.args[2])
    return is_public(choice.args[0]) and low is not None and low <= _LOW


def _keeps(choice: fx.Node) -> bool:
    """Whether a maximum has no effect, because no number of its type is lower (xglm)."""
    low, dtype = _number(choice.args[1]), choice.meta["val"].dtype
    return low is not None and dtype.is_floating_point and low <= torch.finfo(dtype).min


def _heads_apart(query: fx.Node, keys: fx.Node, values: fx.Node) -> bool:
    """Whether heads are part of the batch dimension for the scores only (gpt_neox_japanese)."""
    if (rank(query), rank(keys), rank(values)) != (3, 3, 4):
        return False
    heads = [str(value.meta["val"].shape[0]) for value in (query, keys)]
    return [*map(str, values.meta["val"].shape[:2])] == ["1", heads[0]] == ["1", heads[1]]


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node) and value.op == "get_attr" and is_public(value):
        tensor = value.graph.owning_module
        item: Any = tensor
        for part in str(value.target).split("."):
            item = getattr(item, part)
        return float(item) if isinstance(item, torch.Tensor) and item.numel() == 1 else None
    return None


def _without_sink(node: Any) -> tuple[Any, fx.Node | None]:
    """Scores [B, H, N, L], and the sink that is appended to each row of them, if one is.

    It is one number for each head, or for all, that is public or held by the server. It broadcasts
    to [1, H, 1, 1].
    """
    if not calls(node, aten.cat.default) or len(node.args) < 2 or not last_dim(node, node.args[1]):
        return node, None
    parts = node.args[0]
    if len(parts) != 2 or rank(node) != 4:
        return node, None
    scores, sink = parts
    if calls(sink, aten.expand.default):
        sink = sink.args[0]
    others = [size for i, size in enumerate(reversed(sink.meta["val"].shape)) if i != 2]
    if others != [1] * len(others) or sink.meta["vis"] not in (Vis.PUBLIC, Vis.SERVER):
        return node, None
    return scores, sink


def _kept(softmax: fx.Node) -> fx.Node | None:
    """The weights of a softmax without the last of each row, if nothing reads that one."""
    node = next(iter(softmax.users))
    if len(softmax.users) > 1 or not calls(node, aten.slice.Tensor):
        return None
    rest: tuple[Any, ...] = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    dim, start, end, step = rest
    return node if (start or 0, end, step) == (0, -1, 1) and last_dim(node, dim) else None


def _weighted_sum(softmax: fx.Node) -> fx.Node | None:
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if calls(user, aten.matmul.default) and user.args[0] is node:
            return user
        if not calls(user, aten.reshape.default) or not _same_rows(user):
            return None
        node = user
    return None


def _unsqueeze(before: fx.Node, node: fx.Node) -> fx.Node:
    val = node.meta["val"].unsqueeze(0)
    return insert(before, aten.unsqueeze.default, (node, 0), val, node.meta["vis"])


def _ungroup(node: Any) -> Any:
    """Undo the repetition of keys or values: reshape(expand(unsqueeze(x, 2)))."""
    if calls(node, aten.reshape.default) and calls(node.args[0], aten.expand.default):
        inner = node.args[0].args[0]
        if calls(inner, aten.unsqueeze.default) and inner.args[1] in (2, -3) and rank(node) == 4:
            one, groups, times, length, size = node.args[0].meta["val"].shape
            if list(map(str, node.meta["val"].shape)) == list(
                map(str, (one, groups * times, length, size))
            ):
                return inner.args[0]
    return node
