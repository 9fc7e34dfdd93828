from __future__ import annotations

import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "remove_noops"
X = normal(2, 3)


def test_copies_casts_and_dropout() -> None:
    def body(m, x):
        y = x.clone().float().double().contiguous().detach()
        return torch.dropout(y[:], 0.5, False) + 1.0

    graph = Graph(body, X.float().double())
    assert set(rewrites(graph, NAME, sites=sum(graph.ops.values()) - 1)) == {"aten.add.Tensor"}


def test_nothing_in_front_of_something() -> None:
    def body(m, x):
        return torch.cat([torch.zeros(2, 0), x], 1) * 2.0

    graph = Graph(body, X)
    graph.run(NAME)
    assert "aten.cat.default" not in graph.ops
    assert graph.same()
    assert graph.run(NAME) == 0


def test_near_misses() -> None:
    leaves(Graph(lambda m, x: x[:, 1:] + 1.0, X), NAME)
    leaves(Graph(lambda m, x: x[:, :2] + 1.0, X), NAME)
    leaves(Graph(lambda m, x: torch.cat([x, x], 1), X), NAME)
    leaves(Graph(lambda m, x: x[:, ::2] + 1.0, X), NAME)


def test_a_cast_to_whole_numbers_stays() -> None:
    graph = Graph(lambda m, x: x.to(torch.int64) + 1, X)
    graph.run(NAME)
    assert "aten.to.dtype" in graph.ops
    assert graph.same()


def test_a_view_of_what_was_contiguous() -> None:
    graph = Graph(lambda m, x: x.transpose(1, 2).contiguous().view(2, 12) * 2.0, normal(2, 3, 4))
    assert "aten.reshape.default" in rewrites(graph, "remove_noops")
