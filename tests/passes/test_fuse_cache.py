from __future__ import annotations

import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "fuse_cache"
PAST, NEW = normal(1, 2, 4, 8), normal(1, 2, 3, 8, seed=1)


def test_appending() -> None:
    for dim in (-2, 2):
        graph = Graph(lambda m, p, n, d=dim: torch.cat([p, n * 2.0], d), PAST, NEW)
        assert rewrites(graph, NAME) == {"aten.mul.Tensor": 1, "mpc.cache_append": 1}


def test_near_miss_it_grows_along_another_dimension() -> None:
    graph = Graph(lambda m, p, n: torch.cat([p, n], 1), PAST, normal(1, 3, 4, 8))
    leaves(graph, NAME, reason="second-to-last dimension")


def test_near_misses() -> None:
    leaves(Graph(lambda m, p, n: torch.cat([p * 2.0, n], -2), PAST, NEW), NAME)
    leaves(Graph(lambda m, p, n: torch.cat([p, n, n], -2), PAST, NEW), NAME)
    leaves(Graph(lambda m, p, n: torch.cat([p, n], -2) + 1.0, PAST, NEW, public=(0,)), NAME)
