from __future__ import annotations

import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "unify_spellings"
X = normal(2, 4, 6)


def test_pieces_are_slices() -> None:
    for split in (
        lambda x: x.split(2, -1),
        lambda x: x.split([2, 2, 2], 2),
        lambda x: x.chunk(3, dim=-1),
    ):
        graph = Graph(lambda m, x, s=split: s(x)[1] * s(x)[2], X)
        ops = rewrites(graph, NAME, sites=2)
        assert ops == {"aten.slice.Tensor": 2, "aten.mul.Tensor": 1}


def test_in_place_ops_are_functions() -> None:
    def body(m, x):
        y = x * 2.0
        y.add_(x).div_(8.0).mul_(3.0).sub_(x)
        return y

    ops = rewrites(Graph(body, X), NAME, sites=4)
    assert set(ops) == {f"aten.{name}.Tensor" for name in ("mul", "add", "div", "sub")}


def test_turned_tensors_are_permuted() -> None:
    def body(m, x):
        return x.transpose(1, 2) @ x.transpose(-2, 0).transpose(0, 1), m.w.T * 2.0, m.w.t() * 3.0

    ops = rewrites(Graph(body, normal(4, 4, 4), w=normal(3, 2)), NAME, sites=5)
    assert ops["aten.permute.default"] == 5
    assert not set(ops) & {"aten.transpose.int", "aten.t.default", "aten.numpy_T.default"}


def test_views_are_reshapes() -> None:
    def body(m, x):
        return x.view(2, 24), x.flatten(1), x.flatten() * 2.0

    ops = rewrites(Graph(body, X), NAME, sites=3)
    assert ops["aten.reshape.default"] == 3


def test_flattening_a_length() -> None:
    graph = Graph(lambda m, x: x.flatten(2) * 2.0, normal(2, 5, 2, 3), dynamic=1)
    ops = rewrites(graph, NAME)
    assert ops["aten.reshape.default"] == 1
    graph.inputs = (normal(2, 7, 2, 3),)
    assert graph()[0].shape == (2, 7, 6)


def test_a_factor_of_an_addend_is_a_product() -> None:
    ops = rewrites(Graph(lambda m, x, y: torch.add(x, y, alpha=3), X, X + 1), NAME)
    assert ops == {"aten.mul.Tensor": 1, "aten.add.Tensor": 1}
    ops = rewrites(Graph(lambda m, x, y: torch.sub(x, y, alpha=2.5), X, X + 1), NAME)
    assert ops == {"aten.mul.Tensor": 1, "aten.sub.Tensor": 1}


def test_near_misses() -> None:
    leaves(Graph(lambda m, x: x.reshape(2, 24).permute(1, 0) + x[0, 0, 0], X), NAME)
    leaves(Graph(lambda m, x: torch.softmax(x, -1) @ x.permute(0, 2, 1), X), NAME)


def test_pieces_of_a_length_stay() -> None:
    graph = Graph(lambda m, x: x.chunk(2, 1)[0] * 2.0, normal(2, 6, 2), dynamic=1)
    leaves(graph, NAME, reason="depends on a variable length")
