from __future__ import annotations

import torch

from mergec.runtime.ops.ratio_attention import EPSILON
from tests.passes.harness import Graph, leaves, normal

NAMES = ("remove_noops", "unify_spellings", "fuse_attention", "softmax_2quad")
Q, K, V = normal(1, 4, 3, 8), normal(1, 4, 5, 8, seed=1), normal(1, 4, 5, 8, seed=2)
CAUSAL = torch.full((3, 5), -1e9, dtype=torch.float64).triu(3)


def attention(cap: float = 0.0):
    def body(m, q, k, v):
        scores = q @ k.transpose(-1, -2) * 0.125
        if cap:
            scores = torch.tanh(scores / cap) * cap
        return torch.softmax(scores + m.mask, -1) @ v

    return body


def run(graph: Graph, name: str) -> torch.Tensor:
    for needed in NAMES[:-1]:
        graph.run(needed)
    assert graph.run(name) == 1
    text = graph.text
    assert graph.run(name) == 0
    assert graph.text == text
    assert graph.ops["mpc.ratio_attention"] == 1
    assert "mpc.attention" not in graph.ops
    return graph()[0]


def test_weights_are_squares() -> None:
    for cap in (0.0, 2.0):
        graph = Graph(attention(cap), Q, K, V, _mask=CAUSAL)
        scores = Q @ K.transpose(-1, -2) * 0.125
        if cap:
            scores = torch.tanh(scores / cap) * cap
        weights = ((scores + 5.0) ** 2 + EPSILON) * (CAUSAL == 0)
        weights = weights / weights.sum(-1, keepdim=True)
        assert torch.allclose(run(graph, "softmax_2quad"), weights @ V, atol=1e-12)


def test_what_the_mask_hides_has_no_weight() -> None:
    graph = Graph(attention(), Q, K, V, _mask=CAUSAL)
    before = run(graph, "softmax_2quad")
    for other in (K, V):
        other[:, :, 3:] += 7.0
    after = graph()[0]
    for other in (K, V):
        other[:, :, 3:] -= 7.0
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_near_misses() -> None:
    leaves(Graph(lambda m, x: torch.softmax(x, -1), Q), *NAMES, reason="not recognized as part of")
    leaves(Graph(lambda m, q, k, v: (q @ k.transpose(-1, -2)) @ v, Q, K, V), *NAMES)
