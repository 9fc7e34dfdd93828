from __future__ import annotations

import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "fuse_attention")
Q, K, V = normal(1, 4, 3, 8), normal(1, 4, 5, 8, seed=1), normal(1, 4, 5, 8, seed=2)
CAUSAL = torch.full((3, 5), -1e9, dtype=torch.float64).triu(3)
HIDDEN = CAUSAL < 0
LOW = torch.tensor(-1e9, dtype=torch.float64)


def attention(scores=lambda m, s: s, weights=lambda m, p: p, last=-1):
    def body(m, q, k, v):
        product = scores(m, q @ k.transpose(-1, -2))
        return weights(m, torch.softmax(product, last)) @ v

    return body


def test_scaled_and_masked() -> None:
    for scores in (
        lambda m, s: s * 0.125 + m.mask,
        lambda m, s: m.mask + s / 8.0,
        lambda m, s: (s + m.mask * 8.0) * 0.125,
        lambda m, s: torch.where(m.seen, s * 0.125, m.low),
        lambda m, s: torch.where(m.seen, s, m.low) * 0.125,
    ):
        graph = Graph(attention(scores), Q, K, V, _mask=CAUSAL, _seen=~HIDDEN, _low=LOW)
        ops = rewrites(graph, *NAMES)
        assert ops["mpc.attention"] == 1
        assert not set(ops) & {"aten.matmul.default", "aten.softmax.int"}
        (node,) = [n for n in graph.module.graph.nodes if "attention" in str(n.target)]
        assert node.args[4:] == (0.125, 0.0)


def test_capped() -> None:
    def scores(m, s):
        return torch.tanh(s * 0.5 / 20.0) * 20.0 + m.mask

    graph = Graph(attention(scores), Q, K, V, _mask=CAUSAL)
    assert rewrites(graph, *NAMES)["mpc.attention"] == 1
    (node,) = [n for n in graph.module.graph.nodes if "attention" in str(n.target)]
    assert node.args[4:] == (0.5, 20.0)


def test_grouped_queries_stay_grouped() -> None:
    def repeat(x):
        return x[:, :, None].expand(1, 2, 2, 5, 8).reshape(1, 4, 5, 8)

    def body(m, q, k, v):
        return torch.softmax(q @ repeat(k).transpose(2, 3), -1) @ repeat(v)

    graph = Graph(body, Q, K[:, :2], V[:, :2])
    assert rewrites(graph, *NAMES) == {"mpc.attention": 1}


def test_near_miss_keys_repeated_in_another_order() -> None:
    def repeat(x):
        return x[:, None].expand(1, 2, 2, 5, 8).reshape(1, 4, 5, 8)

    def body(m, q, k, v):
        return torch.softmax(q @ repeat(k).transpose(2, 3), -1) @ repeat(v)

    ops = rewrites(Graph(body, Q, K[:, :2], V[:, :2]), *NAMES)
    assert ops["mpc.attention"] == 1
    assert ops["aten.expand.default"] == 2, "these are no groups of the op"


def test_heads_in_the_batch_dimension() -> None:
    def body(m, q, k, v):
        scores = torch.baddbmm(m.alibi, q, k.transpose(1, 2), beta=1.0, alpha=0.5)
        scores = scores.view(1, 4, 3, 5) + m.mask
        return torch.bmm(torch.softmax(scores, -1).view(4, 3, 5), v)

    graph = Graph(body, Q[0], K[0], V[0], _mask=CAUSAL, _alibi=normal(4, 1, 5))
    assert rewrites(graph, *NAMES)["mpc.attention"] == 1


def test_near_miss_softmax_over_another_dimension() -> None:
    leaves(Graph(attention(last=-2), Q, K, V), *NAMES, reason="not over the last dimension")


def test_near_miss_weights_are_used_twice() -> None:
    def body(m, q, k, v):
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v, weights * 2.0

    leaves(Graph(body, Q, K, V), *NAMES, reason="more than one weighted sum")


def test_near_miss_keys_are_not_turned() -> None:
    graph = Graph(lambda m, q, k, v: torch.softmax(q @ k, -1) @ v, Q, normal(1, 4, 8, 5), V)
    leaves(graph, *NAMES, reason="keys are not transposed")


def test_near_miss_the_unseen_scores_are_not_low() -> None:
    graph = Graph(
        attention(lambda m, s: torch.where(m.seen, s, m.low)),
        Q, K, V, _seen=~HIDDEN, _low=torch.tensor(-1.0, dtype=torch.float64),
    )  # fmt: skip
    leaves(graph, *NAMES, reason="the scores come from")


def test_near_miss_masked_below_the_cap() -> None:
    for scores in (
        lambda m, s: torch.tanh((s + m.mask) / 20.0) * 20.0,
        lambda m, s: torch.tanh(torch.where(m.seen, s, m.low) / 20.0) * 20.0,
    ):
        graph = Graph(attention(scores), Q, K, V, _mask=CAUSAL, _seen=~HIDDEN, _low=LOW)
        leaves(graph, *NAMES, reason="the scores come from")


def test_near_miss_another_cap() -> None:
    graph = Graph(attention(lambda m, s: torch.tanh(s / 20.0) * 10.0), Q, K, V)
    leaves(graph, *NAMES, reason="not a softcap")


def test_near_miss_scaled_after_the_cap() -> None:
    graph = Graph(attention(lambda m, s: torch.tanh(s / 20.0) * 20.0 * 0.5), Q, K, V)
    leaves(graph, *NAMES, reason="capped scores are scaled")


def test_near_miss_rows_are_mixed_by_a_reshape() -> None:
    k, v = K[:, :, :3], V[:, :, :3]
    graph = Graph(attention(lambda m, s: s.reshape(1, 3, 4, 3).reshape(1, 4, 3, 3)), Q, k, v)
    leaves(graph, *NAMES, reason="the scores come from")
    graph = Graph(
        attention(weights=lambda m, p: p.reshape(1, 3, 3, 4).reshape(1, 4, 3, 3)), Q, k, v
    )
    leaves(graph, *NAMES, reason="more than one weighted sum")


def test_a_bias_that_the_server_holds() -> None:
    """Beside a mask, scaled as the scores are, and under a softcap, where it cannot pass."""

    def body(m, q, k, v):
        scores = (q @ k.transpose(-1, -2) + m.bias) * 0.5 + m.mask + m.bias
        return torch.softmax(scores, -1) @ v

    graph = Graph(body, Q, K, V, bias=normal(4, 3, 5), _mask=CAUSAL)
    assert rewrites(graph, *NAMES)["mpc.attention"] == 1
    capped = attention(lambda m, s: 20.0 * torch.tanh((s + m.bias) / 20.0))
    leaves(Graph(capped, Q, K, V, bias=normal(3, 5)), *NAMES, reason="the scores come from")


def test_near_miss_a_secret_bias() -> None:
    """One that depends on the client's input."""

    def body(m, q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) + q[..., :1], -1) @ v

    leaves(Graph(body, Q, K, V), *NAMES, reason="the scores come from aten.add.Tensor")


def test_a_number_added_to_all_scores_is_left() -> None:
    leaves(Graph(attention(lambda m, s: s + 1.0), Q, K, V), *NAMES, reason="the scores come from")


def test_heads_in_the_batch_dimension_of_the_scores_alone() -> None:
    """gpt_neox_japanese."""

    def body(m, q, k, v):
        scores = torch.baddbmm(m.zeros, q, k.transpose(1, 2), beta=1.0, alpha=0.5)
        return torch.softmax(scores.view(1, 4, 3, 5) + m.mask, -1) @ v

    graph = Graph(body, Q[0], K[0], V, _mask=CAUSAL, _zeros=Q.new_zeros(4, 3, 5))
    assert rewrites(graph, *NAMES)["mpc.attention"] == 1


def test_near_miss_other_heads_for_the_weighted_sum() -> None:
    def body(m, q, k, v):
        return torch.softmax((q @ k.transpose(1, 2)).view(2, 2, 3, 5), -1) @ v

    graph = Graph(body, Q[0], K[0], V.reshape(2, 2, 5, 8))
    leaves(graph, *NAMES, reason="not of the weighted sum")


def test_no_score_is_lower_than_the_lowest_number() -> None:
    """xglm."""
    lowest = torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64)
    graph = Graph(
        attention(lambda m, s: torch.max(s + m.mask, m.least)), Q, K, V, _mask=CAUSAL, _least=lowest
    )
    assert rewrites(graph, *NAMES)["mpc.attention"] == 1


def test_near_miss_a_least_score() -> None:
    graph = Graph(
        attention(lambda m, s: torch.max(s + m.mask, m.least)), Q, K, V, _mask=CAUSAL, _least=LOW
    )
    leaves(graph, *NAMES, reason="the scores come from aten.max")


def test_a_mask_of_terms_that_broadcast() -> None:
    """mpt: one row of biases for each head, and a mask of each row."""

    def scores(m, s):
        return torch.where(m.seen, s + m.bias, m.low)

    graph = Graph(attention(scores), Q, K, V, _bias=normal(4, 1, 5), _seen=~HIDDEN, _low=LOW)
    assert rewrites(graph, *NAMES)["mpc.attention"] == 1
    (node,) = [n for n in graph.module.graph.nodes if "attention" in str(n.target)]
    assert list(node.args[3].meta["val"].shape) == [4, 3, 5]
