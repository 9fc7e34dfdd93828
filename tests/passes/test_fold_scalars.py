from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "embedding_to_dialect", "fuse_layer_norm",
         "linear_to_dialect", "arithmetic_to_dialect", "fold_scalars")  # fmt: skip
X, W, B, G = normal(1, 3, 8), normal(5, 8), normal(5), normal(8)
IDS = torch.tensor([[3, 1, 4]])


def test_after_a_linear_layer() -> None:
    graph = Graph(lambda m, x: F.linear(x, m.w, m.b) * 0.22, X, w=W, b=B)
    assert rewrites(graph, *NAMES) == {"mpc.linear": 1}
    assert set(graph.info.constants) == {"w_folded", "b_folded"}


def test_rows_are_moved_between() -> None:
    graph = Graph(lambda m, x: F.linear(x, m.w).reshape(3, 5, 1)[1:] / 3.0, X, w=W)
    assert "mpc.scale" not in rewrites(graph, *NAMES)


def test_two_factors() -> None:
    graph = Graph(lambda m, x: F.linear(x, m.w) * 0.3 * -0.7, X, w=W)
    assert rewrites(graph, *NAMES, sites=2) == {"mpc.linear": 1}


def test_into_a_table_and_a_norm() -> None:
    graph = Graph(lambda m, i: F.embedding(i, m.w) * 2.8, IDS, w=W)
    assert rewrites(graph, *NAMES) == {"mpc.embedding": 1}
    graph = Graph(lambda m, x: F.layer_norm(x, (8,), m.g, m.b) * 0.3, X, g=G, b=G + 1)
    assert rewrites(graph, *NAMES) == {"mpc.layer_norm": 1}


def test_a_power_of_two_is_left() -> None:
    leaves(Graph(lambda m, x: F.linear(x, m.w) * 0.125, X, w=W), *NAMES)
    leaves(Graph(lambda m, x: F.linear(x, m.w) * -2.0, X, w=W), *NAMES)


def test_near_miss_a_tied_table() -> None:
    """gemma: the table is the head's matrix, too."""

    def body(m, i):
        x = F.embedding(i, m.w) * 2.8
        return F.linear(x.square(), m.w)

    leaves(Graph(body, IDS, w=W), *NAMES, reason="used elsewhere")


def test_near_miss_the_layer_has_other_users() -> None:
    def body(m, x):
        y = F.linear(x, m.w)
        return y * 0.3 + y

    leaves(Graph(body, X, w=W), *NAMES, reason="other users")


def test_near_miss_no_weights() -> None:
    leaves(Graph(lambda m, x: x * 0.3, X), *NAMES, reason="no weights")
    graph = Graph(lambda m, x: F.layer_norm(x, (8,), None, m.b) * 0.3, X, b=G)
    leaves(graph, *NAMES, reason="no weights")
