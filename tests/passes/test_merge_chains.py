from __future__ import annotations

import torch.nn.functional as F

from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "linear_to_dialect", "arithmetic_to_dialect",
         "merge_chains")  # fmt: skip
X, W, V, B, C = normal(1, 3, 8), normal(6, 8), normal(5, 6), normal(6), normal(5)


def test_biases_go_along() -> None:
    for body, constants in (
        (lambda m, x: F.linear(F.linear(x, m.w, m.b), m.v, m.c), {"v_folded", "c_folded"}),
        (lambda m, x: F.linear(F.linear(x, m.w, m.b), m.v), {"v_folded", "bias_folded"}),
        (lambda m, x: F.linear(F.linear(x, m.w), m.v, m.c), {"v_folded", "c"}),
        (lambda m, x: F.linear(F.linear(x, m.w), m.v), {"v_folded"}),
    ):
        graph = Graph(body, X, w=W, v=V, b=B, c=C)
        assert rewrites(graph, *NAMES) == {"mpc.linear": 1}
        assert set(graph.info.constants) == constants


def test_three_in_a_row() -> None:
    def body(m, x):
        return F.linear(F.linear(F.linear(x, m.w), m.v), m.u)

    graph = Graph(body, X, w=W, v=V, u=normal(5, 5))
    assert rewrites(graph, *NAMES, sites=2) == {"mpc.linear": 1}


def test_near_miss_a_low_rank_pair() -> None:
    graph = Graph(lambda m, x: F.linear(F.linear(x, m.w), m.v), X, w=normal(2, 8), v=normal(8, 2))
    leaves(graph, *NAMES, reason="only 2 features in between")


def test_near_miss_something_between() -> None:
    leaves(Graph(lambda m, x: F.linear(F.linear(x, m.w).relu(), m.v), X, w=W, v=V), *NAMES)
    leaves(Graph(lambda m, x: F.linear(F.linear(x, m.w) + m.b, m.v), X, w=W, v=V, b=B), *NAMES)


def test_near_miss_the_first_result_is_used_twice() -> None:
    def body(m, x):
        y = F.linear(x, m.w)
        return F.linear(y, m.v), y * 2.0

    leaves(Graph(body, X, w=W, v=V), *NAMES, reason="of %linear_default is also used")


def test_near_miss_a_tied_matrix() -> None:
    def body(m, x):
        return F.linear(F.linear(x, m.w), m.v), F.linear(x + 1.0, m.w).relu()

    leaves(Graph(body, X, w=W, v=V), *NAMES, reason="used elsewhere")
