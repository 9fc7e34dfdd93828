"""Expand torch's fused attention, so that one pattern recognizes all attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, rank
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call, length


class ExpandSdpa(Pass):
    """Expands `scaled_dot_product_attention`, as called by custom modules and MultiheadAttention.

    Before:
        %q = input : shared 1x2xnewx64
        %k = input : shared 1x2xnewx64
        %v = input : shared 1x2xnewx64
        %1 = aten.scaled_dot_product_attention.default(%q, %k, %v, None, 0.0, True)
    After:
        %permute = aten.permute.default(%k, [0, 1, 3, 2])
        %matmul = aten.matmul.default(%q, %permute)
        %mul = aten.mul.Tensor(%matmul, 0.125)
        %sym_size = aten.sym_size.int(%q, 2)
        %sym_size.2 = aten.sym_size.int(%k, 2)
        %full = aten.full.default([%sym_size, %sym_size.2], -inf, dtype=torch.float64)
        %triu = aten.triu.default(%full, 1)
        %add = aten.add.Tensor(%mul, %triu)
        %softmax = aten.softmax.int(%add, -1)
        %matmul.2 = aten.matmul.default(%softmax, %v)
    """

    stage = "canonicalize"
    after = ("remove_noops",)

    def run(self, graph_module: fx.GraphModule) -> int:
        found = [
            node
            for node in graph_module.graph.nodes
            if calls(node, aten.scaled_dot_product_attention.default) and is_shared(node)
        ]
        return sum(map(self._expand, found))

    def _expand(self, node: fx.Node) -> int:
        query, key, value, mask, _, causal = (*node.args, *_DEFAULTS[len(node.args) - 3 :])[:6]
        scale, grouped = node.kwargs.get("scale"), node.kwargs.get("enable_gqa", False)
        if node.kwargs.get("dropout_p") or node.kwargs.get("attn_mask") is not None:
            self.skip(node, "its mask or dropout is a keyword argument")
            return 0
        features = query.meta["val"].shape[-1]
        if not isinstance(features, int) or rank(query) not in (3, 4):
            self.skip(node, "its queries are not [batch, heads, tokens, features]")
            return 0
        if grouped:
            key, value = (_repeat(node, query, tensor) for tensor in (key, value))
        order = [*range(rank(key) - 2), rank(key) - 1, rank(key) - 2]
        scores = insert_call(
            node, aten.matmul.default, query, insert_call(node, aten.permute.default, key, order)
        )
        factor = 1 / math.sqrt(features) if scale is None else scale
        scores = insert_call(node, aten.mul.Tensor, scores, factor)
        if causal:
            mask = _causal(node, query, key)
        elif mask is not None and mask.meta["val"].dtype is torch.bool:
            hidden = insert_call(node, aten.logical_not.default, mask)
            zeros = insert_call(node, aten.zeros_like.default, mask, dtype=query.meta["val"].dtype)
            mask = insert_call(node, aten.masked_fill.Scalar, zeros, hidden, -math.inf)
        if mask is not None:
            scores = insert_call(node, aten.add.Tensor, scores, mask)
        weights = insert_call(node, aten.softmax.int, scores, -1)
        node.replace_all_uses_with(insert_call(node, aten.matmul.default, weights, value))
        # Its dropout makes it count as random, so dead-code removal would keep it.
        node.graph.erase_node(node)
        return 1


_DEFAULTS: tuple[Any, ...] = (None, 0.0, False)


def _repeat(before: fx.Node, query: fx.Node, tensor: fx.Node) -> fx.Node:
    """Keys or values repeated for each query head of their group, as models themselves do it."""
    batch, groups, size, features = (length(before, tensor, dim) for dim in range(4))
    times = query.meta["val"].shape[1] // tensor.meta["val"].shape[1]
    apart = insert_call(before, aten.unsqueeze.default, tensor, 2)
    shape = [batch, groups, times, size, features]
    wide = insert_call(before, aten.expand.default, apart, shape)
    return insert_call(before, aten.reshape.default, wide, [batch, groups * times, size, features])


def _causal(before: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
    shape = [length(before, query, -2), length(before, key, -2)]
    dtype = query.meta["val"].dtype
    hidden = insert_call(before, aten.full.default, shape, -math.inf, dtype=dtype)
    return insert_call(before, aten.triu.default, hidden, 1)
