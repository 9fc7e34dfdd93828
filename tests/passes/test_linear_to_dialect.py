from __future__ import annotations

import torch
import torch.nn.functional as F

from mergec.runtime.core.spec import Vis
from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "linear_to_dialect")
X, W, B = normal(2, 3, 8), normal(5, 8), normal(5)


def test_with_bias_and_without() -> None:
    for body in (lambda m, x: F.linear(x, m.w, m.b), lambda m, x: F.linear(x, m.w)):
        assert rewrites(Graph(body, X, w=W, b=B), *NAMES) == {"mpc.linear": 1}


def test_a_matrix_that_stands_the_other_way_is_turned_once() -> None:
    def body(m, x):
        y = torch.addmm(m.b, x, m.w)
        return y, x @ m.w

    graph = Graph(body, X[0], w=W.T.contiguous(), b=B)
    assert rewrites(graph, *NAMES, sites=2) == {"mpc.linear": 2}
    assert graph.info.constants["w_turned"] is Vis.SERVER
    assert "%w_turned" in graph.text
    assert "%w," not in graph.text


def test_products_with_a_matrix() -> None:
    for body in (lambda m, x: x @ m.w.T, lambda m, x: torch.matmul(x, m.w.t())):
        assert rewrites(Graph(body, X, w=W), *NAMES)["mpc.linear"] == 1


def test_near_miss_a_computed_matrix() -> None:
    graph = Graph(lambda m, x: F.linear(x, m.w * 2.0), X, w=W)
    leaves(graph, *NAMES, reason="computed at run time")


def test_near_miss_factors_of_its_own() -> None:
    graph = Graph(lambda m, x: torch.addmm(m.b, x, m.w, alpha=2.0), X[0], w=W.T.contiguous(), b=B)
    leaves(graph, *NAMES, reason="alpha or beta is not 1")


def test_near_misses() -> None:
    leaves(Graph(lambda m, x, y: x @ y.transpose(1, 2), X, X + 1), *NAMES)
    leaves(Graph(lambda m, x: m.w @ x.transpose(1, 2), X, w=W), *NAMES)
    leaves(Graph(lambda m, x: x @ m.w, X, w=normal(2, 8, 5)), *NAMES)
    leaves(Graph(lambda m, x: F.linear(x, m.w), X, w=W, public=(0,)), *NAMES)
