from __future__ import annotations

import torch
from torch.nn.functional import layer_norm

from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "fuse_layer_norm"
X, W, B = normal(2, 3, 8), normal(8), normal(8, seed=1)


def test_with_gain_with_bias_and_without() -> None:
    for body in (
        lambda m, x: layer_norm(x, (8,), m.w, m.b, 1e-6),
        lambda m, x: layer_norm(x, (8,), m.w),
        lambda m, x: layer_norm(x, (8,)),
        lambda m, x: layer_norm(x, (8,), eps=0.5),
    ):
        assert rewrites(Graph(body, X, w=W, b=B), NAME) == {"mpc.layer_norm": 1}


def test_near_miss_several_dimensions() -> None:
    graph = Graph(lambda m, x: layer_norm(x, (3, 8)), X)
    leaves(graph, NAME, reason="several dimensions")


def test_near_miss_a_public_row() -> None:
    leaves(Graph(lambda m, x: layer_norm(x, (8,)), X, public=(0,)), NAME)


def test_near_miss_another_norm() -> None:
    leaves(Graph(lambda m, x: x - torch.mean(x, -1, keepdim=True), X), NAME)
