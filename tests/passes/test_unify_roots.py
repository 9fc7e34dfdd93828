from __future__ import annotations

import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "unify_roots"
X = normal(2, 3).abs() + 0.5


def test_spellings() -> None:
    for body in (
        lambda m, x: x**-0.5,
        lambda m, x: 1.0 / torch.sqrt(x),
        lambda m, x: torch.sqrt(x).reciprocal(),
        lambda m, x: x / torch.sqrt(x),
        lambda m, x: x / x**0.5,
        lambda m, x: 3.0 / x.sqrt(),
    ):
        ops = rewrites(Graph(body, X), NAME)
        assert ops.pop("aten.rsqrt.default") == 1
        assert set(ops) <= {"aten.mul.Tensor"}


def test_near_misses() -> None:
    leaves(Graph(lambda m, x: x / (torch.sqrt(x) + 1e-6), X), NAME)
    leaves(Graph(lambda m, x: torch.sqrt(x) / x, X), NAME)
    leaves(Graph(lambda m, x: x**-1.5 + x**0.5, X), NAME)
    leaves(Graph(lambda m, x: x / torch.sqrt(m.t), X, _t=X), NAME)
    leaves(Graph(lambda m, x: x**-0.5, X, public=(0,)), NAME)
