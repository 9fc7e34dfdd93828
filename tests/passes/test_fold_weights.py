from __future__ import annotations

import torch
import torch.nn.functional as F

from mergec.runtime.core.spec import Vis
from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "fold_weights"
X, G, W = normal(1, 3, 8), normal(8), normal(5, 8)


def test_a_gain_that_is_stored_less_one() -> None:
    graph = Graph(lambda m, x: F.layer_norm(x, (8,), m.g + 1.0, m.b), X, g=G, b=G - 2)
    assert rewrites(graph, "fuse_layer_norm", NAME) == {"mpc.layer_norm": 1}
    assert graph.info.constants["g_folded"] is Vis.SERVER


def test_a_chain_with_a_table_is_one_weight() -> None:
    graph = Graph(lambda m, x: x * (F.softplus(m.g) * m.t).reshape(1, 8), X, g=G, _t=G * G)
    assert rewrites(graph, NAME) == {"aten.mul.Tensor": 1}
    assert "g_folded" in graph.info.constants


def test_each_value_that_is_taken() -> None:
    def body(m, x):
        scaled = m.w * 0.3
        return F.linear(x, scaled), F.linear(x, scaled.abs())

    graph = Graph(body, X, w=W)
    ops = rewrites(graph, NAME, sites=2)
    assert ops == {"aten.linear.default": 2}
    assert {"w_folded", "w_folded_2"} <= set(graph.info.constants)


def test_near_miss_movement_alone() -> None:
    leaves(Graph(lambda m, x: x @ m.w.T, X, w=W), "unify_spellings", NAME)


def test_near_miss_public_tables() -> None:
    leaves(Graph(lambda m, x: x * (m.t + 1.0), X, _t=G), NAME)


def test_near_miss_secret_values() -> None:
    leaves(Graph(lambda m, x: (x + 1.0) * m.g, X, g=G), NAME)


def test_near_miss_what_is_written_to() -> None:
    def body(m, x):
        gain = m.g * 1.0
        gain.add_(1.0)
        return x * torch.cos(gain)

    leaves(Graph(body, X, g=G), NAME)
