from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "expand_sdpa"
FUSE = (NAME, "unify_spellings", "fuse_attention")
Q, K, V = normal(1, 4, 3, 8), normal(1, 4, 5, 8, seed=1), normal(1, 4, 5, 8, seed=2)
SEEN = torch.ones(3, 5, dtype=torch.bool).tril(1)
BIAS = normal(3, 5)


def test_becomes_the_pattern_of_an_attention() -> None:
    for body in (
        lambda m, q, k, v: sdpa(q, k, v),
        lambda m, q, k, v: sdpa(q, k, v, is_causal=True),
        lambda m, q, k, v: sdpa(q, k, v, m.seen, scale=0.5),
        lambda m, q, k, v: sdpa(q, k, v, m.bias),
    ):
        graph = Graph(body, Q, K, V, _seen=SEEN, _bias=BIAS)
        assert "aten.scaled_dot_product_attention.default" in graph.ops
        ops = rewrites(graph, NAME)
        assert (ops["aten.matmul.default"], ops["aten.softmax.int"]) == (2, 1)
        assert rewrites(graph, *FUSE)["mpc.attention"] == 1


def test_any_number_of_tokens() -> None:
    graph = Graph(lambda m, x: sdpa(x, x, x, is_causal=True), Q, dynamic=2)
    rewrites(graph, NAME)
    for count in (1, 4):
        x = normal(1, 4, count, 8)
        graph.inputs = (x,)
        assert torch.allclose(graph()[0], sdpa(x, x, x, is_causal=True), atol=1e-12)


def test_groups_are_taken_back_by_the_fusion() -> None:
    def body(m, q, k, v):
        return sdpa(q, k[:, :2], v[:, :2], enable_gqa=True)

    graph = Graph(body, Q, K, V)
    ops = rewrites(graph, *FUSE)
    assert ops == {"aten.slice.Tensor": 2, "mpc.attention": 1}


def test_heads_without_a_batch() -> None:
    graph = Graph(lambda m, q, k, v: sdpa(q, k, v, is_causal=True), Q[0], K[0], V[0])
    assert rewrites(graph, *FUSE)["mpc.attention"] == 1


def test_near_miss_public_attention() -> None:
    leaves(Graph(lambda m, q, k, v: sdpa(q, k, v), Q, K, V, public=(0, 1, 2)), NAME)


def test_near_miss_single_head() -> None:
    graph = Graph(lambda m, q, k, v: sdpa(q, k, v), Q[0, 0], K[0, 0], V[0, 0])
    leaves(graph, NAME, reason="not [batch, heads, tokens, features]")
