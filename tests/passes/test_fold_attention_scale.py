from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mergec.compiler.graph.factors import split_factor
from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "fuse_attention", "fuse_rms_norm", "fuse_rotary",
         "linear_to_dialect", "arithmetic_to_dialect", "fold_attention_scale")  # fmt: skip
X, W, B, G = normal(1, 3, 8), normal(8, 8), normal(8), normal(4)
K, V = normal(1, 2, 5, 4, seed=1), normal(1, 2, 5, 4, seed=2)
COS, SIN = normal(3, 4), normal(3, 4, seed=5)
ODD = 1 / math.sqrt(24)


def heads(y):
    return y.reshape(1, 3, 2, 4).transpose(1, 2)


def attend(q, k, v, scale=ODD):
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


def attention_of(graph: Graph):
    (node,) = [n for n in graph.module.graph.nodes if "attention" in str(n.target)]
    return node


@pytest.mark.parametrize("bias", [False, True])
def test_into_weight_and_bias(bias: bool) -> None:
    def body(m, x, k, v):
        return attend(heads(F.linear(x, m.w, m.b if bias else None)), k, v)

    graph = Graph(body, X, K, V, w=W, b=B)
    assert "mpc.scale" not in rewrites(graph, *NAMES)
    assert attention_of(graph).args[4] == 0.25
    assert set(graph.info.constants) == ({"w_folded", "b_folded"} if bias else {"w_folded"})


def test_through_a_rotary_embedding() -> None:
    def body(m, x, k, v):
        q = heads(F.linear(x, m.w))
        turned = torch.cat([-q[..., 2:], q[..., :2]], -1)
        return attend(q * m.cos + turned * m.sin, k, v)

    graph = Graph(body, X, K, V, w=W, _cos=COS, _sin=SIN)
    assert rewrites(graph, *NAMES)["mpc.rotary"] == 1
    assert attention_of(graph).args[4] == 0.25


def test_into_the_gain_of_the_queries_norm() -> None:
    def gemma(m, x, k, v):
        x = heads(x)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.g)
        return attend(y, k, v)

    for body in (
        lambda m, x, k, v: attend(F.rms_norm(heads(x), (4,), m.g, 1e-6), k, v),
        gemma,
    ):
        graph = Graph(body, X, K, V, g=G)
        rewrites(graph, *NAMES)
        assert attention_of(graph).args[4] == 0.25


def test_one_layer_makes_queries_keys_and_values() -> None:
    """Side by side (gpt2), or head by head (gpt_neox): only the queries' columns are scaled."""

    def side_by_side(m, x):
        return attend(*map(heads, F.linear(x, m.w, m.b).split(8, -1)))

    def by_head(m, x):
        q, k, v = F.linear(x, m.w, m.b).reshape(1, 3, 2, 12).transpose(1, 2).chunk(3, -1)
        return attend(q, k, v)

    for body, first in ((side_by_side, range(8)), (by_head, [*range(4), *range(12, 16)])):
        graph = Graph(body, X, w=normal(24, 8), b=normal(24))
        assert "mpc.scale" not in rewrites(graph, *NAMES)
        changed = (graph.module.b_folded != normal(24)).nonzero().flatten()
        assert changed.tolist() == list(first)


def test_near_miss_a_query_is_its_own_key() -> None:
    def body(m, x, v):
        q = heads(F.linear(x, m.w))
        return attend(q, q, v)

    leaves(Graph(body, X, V[:, :, :3], w=W), *NAMES, reason="other users")


def test_queries_scaled_by_the_model() -> None:
    """opt: the scale comes before the split into heads; a power of two then needs no weight."""

    def body(scale):
        return lambda m, x, k, v: attend(heads(F.linear(x, m.w) * scale), k, v, 1.0)

    graph = Graph(body(ODD), X, K, V, w=W)
    assert "mpc.scale" not in rewrites(graph, *NAMES)
    assert attention_of(graph).args[4] == 0.25
    graph = Graph(body(0.125), X, K, V, w=W)
    assert "mpc.scale" not in rewrites(graph, *NAMES)
    assert attention_of(graph).args[4] == 0.125
    assert set(graph.info.constants) == {"w"}


def test_the_weights_keep_their_size() -> None:
    for factor in (0.3, -7.1, 1e-9, 1.0, 1.5e8):
        rest, power = split_factor(factor)
        assert rest * power == factor
        assert 0.7 < abs(rest) < 1.42
        assert math.frexp(power)[0] == 0.5


def test_a_power_of_two_is_left() -> None:
    def body(m, x, k, v):
        return attend(heads(F.linear(x, m.w)), k, v, 0.125)

    leaves(Graph(body, X, K, V, w=W), *NAMES)


def test_near_miss_the_queries_are_used_twice() -> None:
    def body(m, x, k, v):
        q = heads(F.linear(x, m.w))
        return attend(q, k, v), q

    leaves(Graph(body, X, K, V, w=W), *NAMES, reason="other users")


def test_near_miss_tied_queries_and_keys() -> None:
    def body(m, x, v):
        return attend(heads(F.linear(x, m.w)), heads(F.linear(x + 1.0, m.w)), v)

    leaves(Graph(body, X, V[:, :, :3], w=W), *NAMES, reason="used elsewhere")


def test_near_miss_queries_without_weights() -> None:
    leaves(
        Graph(lambda m, x, k, v: attend(F.rms_norm(heads(x), (4,)), k, v), X, K, V),
        *NAMES, reason="has no weights",
    )  # fmt: skip
