from __future__ import annotations

import torch

from mergec.runtime.core.spec import Vis
from tests.passes.harness import Graph, leaves, normal

NAME = "publish_masks"
X = normal(5, 5)


def published(table: torch.Tensor) -> bool:
    graph = Graph(lambda m, x: torch.exp(x + m.t), X, t=table)
    changed = graph.run(NAME)
    assert changed == (graph.info.constants["t"] is Vis.PUBLIC)
    assert graph.same()
    assert graph.run(NAME) == 0
    return bool(changed)


def test_causal_masks() -> None:
    ones = torch.ones(5, 5)
    for table in (
        ones.tril(),
        ones.tril().double().view(1, 1, 5, 5),
        ones.triu(1),
        (ones * float("-inf")).triu(1),
        (ones * -1e9).triu(1),
    ):
        assert published(table)


def test_the_mask_then_hides_scores() -> None:
    def body(m, x):
        return torch.softmax(x.masked_fill(m.t[:, :5] == 0, float("-inf")), -1) @ x

    graph = Graph(body, X, t=torch.ones(5, 5).tril())
    graph.run(NAME)
    assert graph.run("expand_composites") == 1
    assert "aten.where.self" in graph.ops
    assert graph.same()


def test_near_misses_are_weights() -> None:
    ones = torch.ones(5, 5)
    nearly = ones.tril()
    nearly[4, 0] = 0.5
    for table in (
        ones,
        nearly,
        ones.tril() * 0.5,
        ones.tril(1),
        ones.tril(-1),
        ones[:, :1],
        torch.eye(5),
        torch.zeros(5, 5),
        torch.arange(5.0),
        torch.ones(1),
        normal(5, 5),
    ):
        assert not published(table)


def test_near_miss_a_public_mask() -> None:
    leaves(Graph(lambda m, x: x * m.t, X, _t=torch.ones(5, 5).tril()), NAME)
