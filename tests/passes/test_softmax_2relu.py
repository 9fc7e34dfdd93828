from __future__ import annotations

import torch

from mergec.runtime.ops.ratio_attention import EPSILON
from tests.passes.harness import Graph, leaves
from tests.passes.test_softmax_2quad import CAUSAL, NAMES, K, Q, V, attention, run


def test_weights_are_rectified() -> None:
    graph = Graph(attention(), Q, K, V, _mask=CAUSAL)
    weights = ((Q @ K.transpose(-1, -2) * 0.125).relu() + EPSILON) * (CAUSAL == 0)
    weights = weights / weights.sum(-1, keepdim=True)
    assert torch.allclose(run(graph, "softmax_2relu"), weights @ V, atol=1e-12)


def test_a_row_without_a_positive_score_is_the_mean() -> None:
    graph = Graph(attention(), Q.abs(), -K.abs(), V, _mask=CAUSAL)
    result = run(graph, "softmax_2relu")
    for row in range(3):
        assert torch.allclose(result[:, :, row], V[:, :, : row + 3].mean(-2), atol=1e-12)


def test_near_misses() -> None:
    leaves(
        Graph(lambda m, x: torch.softmax(x, -1), Q),
        "fuse_attention",
        "softmax_2relu",
        reason="not recognized as part of",
    )
    graph = Graph(attention(), Q, K, V, _mask=CAUSAL)
    for name in NAMES:
        graph.run(name)
    assert graph.run("softmax_2relu") == 0, "2Quad came first"
