from __future__ import annotations

import torch

from mergec.passes.fold_public import LARGEST
from mergec.runtime.core.spec import Vis
from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "fold_public"
X = normal(1, 3, 8)


def test_a_table_is_one_constant() -> None:
    def body(m, x):
        angles = 10000.0 ** (-torch.arange(0, 8, dtype=torch.float64) / 8)
        return x * torch.cos(angles * m.t), x + torch.sin(angles)

    graph = Graph(body, X, _t=normal(8))
    ops = rewrites(graph, NAME, sites=2)
    assert ops == {"aten.mul.Tensor": 1, "aten.add.Tensor": 1}
    assert [v for k, v in graph.info.constants.items() if "folded" in k] == [Vis.PUBLIC] * 2


def test_what_depends_on_a_length_is_left() -> None:
    def body(m, x):
        frequencies = 1.0 / (10.0 ** torch.arange(0, 8, dtype=torch.float64))
        return x * torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequencies)

    graph = Graph(body, X, dynamic=1)
    ops = rewrites(graph, NAME)
    assert {"aten.outer.default", "aten.arange.default"} <= set(ops)
    assert "aten.pow.Scalar" not in ops
    graph.inputs = (normal(1, 6, 8),)
    assert graph()[0].shape == (1, 6, 8)


def test_names_are_not_taken_twice() -> None:
    graph = Graph(lambda m, x: x * (m.t + 1.0), X, _t=normal(8))
    rewrites(graph, NAME)
    before = dict(graph.info.constants)
    (output,) = [n for n in graph.module.graph.nodes if n.op == "output"]
    assert output.all_input_nodes
    assert "_folded_0" in before


def test_near_miss_weights() -> None:
    leaves(Graph(lambda m, x: x * (m.w + 1.0), X, w=normal(8)), NAME)


def test_near_miss_secret_values() -> None:
    leaves(Graph(lambda m, x: torch.cos(x) * 2.0, X), NAME)


def test_near_miss_a_large_table() -> None:
    def body(m, x):
        return x + torch.full((1024, 1024), 2.0).triu(1)[:3, :1]

    graph = Graph(body, X)
    assert LARGEST < 1024 * 1024
    assert rewrites(graph, NAME)["aten.add.Tensor"] == 1, "the slice is small again"
    graph = Graph(lambda m, x: x[0, 0, 0] + torch.full((1024, 1024), 2.0).triu(1), X)
    leaves(graph, NAME, reason="its value is too large to store")


def test_near_miss_what_is_written_to() -> None:
    def body(m, x):
        counts = torch.zeros(3)
        counts.copy_(m.t)
        return x * counts[:, None]

    graph = Graph(body, X, _t=torch.ones(3))
    graph.run(NAME)
    assert graph.same()
    assert graph.same(), "the second call starts from zero too"
