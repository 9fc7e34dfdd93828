from __future__ import annotations

import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "fuse_rms_norm")
X, W = normal(2, 3, 8), normal(8)


def inverse(x, eps=1e-6, dim=-1):
    return torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)


def test_spellings() -> None:
    for body in (
        lambda m, x: m.w * (x * inverse(x)),
        lambda m, x: inverse(x) * x * m.w,
        lambda m, x: x * inverse(x),
        lambda m, x: x * inverse(x) * (1.0 + m.w),
        lambda m, x: x * inverse(x) * (m.w + 1.0),
        lambda m, x: m.w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 0.5)).double(),
        lambda m, x: torch.nn.functional.rms_norm(x, (8,), m.w, 1e-5),
        lambda m, x: torch.nn.functional.rms_norm(x * 1e-8, (8,), m.w),
    ):
        ops = rewrites(Graph(body, X, w=W), *NAMES)
        assert ops.pop("mpc.rms_norm") == 1
        assert set(ops) <= {"aten.add.Tensor", "aten.mul.Tensor"}


def test_the_norm_is_used_twice() -> None:
    def body(m, x):
        y = x * inverse(x)
        return y * m.w, y * m.v

    assert rewrites(Graph(body, X, w=W, v=normal(8, seed=3)), *NAMES)["mpc.rms_norm"] == 1


def test_near_miss_another_dimension() -> None:
    graph = Graph(lambda m, x: m.w * (x * inverse(x, dim=1)), X, w=W)
    leaves(graph, *NAMES, reason="not a mean of squares over the last dimension")


def test_near_miss_another_power() -> None:
    graph = Graph(lambda m, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1.0), X)
    leaves(graph, *NAMES, reason="not a mean of squares")


def test_near_miss_it_scales_another_row() -> None:
    graph = Graph(lambda m, x: (x + 1.0) * inverse(x), X)
    leaves(graph, *NAMES, reason="does not scale the row")


def test_near_miss_the_gain_is_no_row_of_weights() -> None:
    """The op's gain has one number for each feature."""
    for gain in (normal(3, 8), normal(3, 1), normal(1)):
        graph = Graph(lambda m, x: x * inverse(x) * m.w, X, w=gain)
        assert rewrites(graph, *NAMES) == {"mpc.rms_norm": 1, "aten.mul.Tensor": 1}


def test_near_miss_several_dimensions() -> None:
    graph = Graph(lambda m, x: torch.nn.functional.rms_norm(x, (3, 8)), X)
    leaves(graph, *NAMES, reason="several dimensions")


def test_near_miss_a_public_row() -> None:
    leaves(Graph(lambda m, x: x * inverse(x), X, public=(0,)), *NAMES)
