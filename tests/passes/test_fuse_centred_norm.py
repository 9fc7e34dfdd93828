from __future__ import annotations

import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "expand_composites", "unify_roots", "fuse_centred_norm")
X, W, B = normal(2, 3, 8), normal(8), normal(8, seed=1)


def centred(x, dim=-1):
    return x - x.mean(dim, keepdim=True)


def inverse(x, eps=1e-5):
    return torch.rsqrt(centred(x).pow(2).mean(-1, keepdim=True) + eps)


def test_spellings() -> None:
    for body in (
        lambda m, x: m.w * (centred(x) * inverse(x)) + m.b,
        lambda m, x: m.b + inverse(x) * centred(x) * m.w,
        lambda m, x: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 0.5) * m.w,
        lambda m, x: m.w * centred(x) / (x.var(-1, keepdim=True, correction=0) + 1e-5) ** 0.5 + m.b,
        lambda m, x: centred(x) * inverse(x) + m.b,
        lambda m, x: centred(x) * inverse(x),
    ):
        assert rewrites(Graph(body, X, w=W, b=B), *NAMES) == {"mpc.layer_norm": 1}


def test_comes_before_the_norm_without_a_mean() -> None:
    def body(m, x):
        y = centred(x)
        return m.w * (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-5))

    assert rewrites(Graph(body, X, w=W), *NAMES) == {"mpc.layer_norm": 1}
    assert NAMES[-1] < "fuse_rms_norm"


def test_a_gain_for_each_head_stays_a_product() -> None:
    graph = Graph(lambda m, x: centred(x) * inverse(x) * m.w, X, w=normal(3, 8))
    assert rewrites(graph, *NAMES) == {"mpc.layer_norm": 1, "aten.mul.Tensor": 1}


def test_near_miss_the_gain_of_two_users() -> None:
    def body(m, x):
        y = centred(x) * inverse(x)
        return y * m.w, y * m.b

    graph = Graph(body, X, w=W, b=B)
    assert rewrites(graph, *NAMES) == {"mpc.layer_norm": 1, "aten.mul.Tensor": 2}


def test_near_miss_the_mean_of_another_dimension() -> None:
    leaves(
        Graph(lambda m, x: centred(x, 1) * torch.rsqrt(centred(x, 1).pow(2).mean(-1, True) + 1), X),
        *NAMES,
    )


def test_near_miss_another_row() -> None:
    graph = Graph(lambda m, x: centred(x * 2.0) * inverse(x), X)
    leaves(graph, *NAMES, reason="does not scale the row")


def test_near_miss_the_row_is_not_centred() -> None:
    graph = Graph(lambda m, x: x * inverse(x), X)
    leaves(graph, *NAMES, reason="does not scale the row")


def test_near_miss_unbiased() -> None:
    leaves(Graph(lambda m, x: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5), X), *NAMES)
