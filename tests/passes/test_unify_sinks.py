"""Both ways to write a sink become attention with one more score, at any length."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.passes.harness import Graph, leaves, normal, rewrites

BEFORE = ("remove_noops", "unify_spellings")
Q, K, V = normal(1, 4, 5, 8), normal(1, 4, 5, 8, seed=1), normal(1, 4, 5, 8, seed=2)
SINKS = normal(4, seed=3)
CAUSAL = torch.full((5, 5), -1e9, dtype=torch.float64).triu(1)


def factor(m, q, k, v):
    """granite_swa."""
    scores = q @ k.transpose(2, 3) * 0.5
    left = (torch.logsumexp(scores, dim=-1) - m.sinks.view(1, -1, 1)).to(torch.float64).sigmoid()
    weights = functional.softmax(scores, dim=-1, dtype=torch.float64)
    return weights @ v * left.unsqueeze(-1)


def appended(m, q, k, v, shift=True):
    """gpt_oss; flint without the shift."""
    scores = q @ k.transpose(2, 3) * 0.5
    sinks = m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    whole = torch.cat([scores, sinks], dim=-1)
    whole = whole - whole.max(dim=-1, keepdim=True).values if shift else whole
    return functional.softmax(whole, dim=-1, dtype=whole.dtype)[..., :-1] @ v


@pytest.mark.parametrize("dynamic", [None, 2])
def test_a_factor_on_the_result(dynamic: int | None) -> None:
    graph = Graph(factor, Q, K, V, dynamic=dynamic, sinks=SINKS)
    ops = rewrites(graph, *BEFORE, "unify_sinks")
    assert not set(ops) & {"aten.logsumexp.default", "aten.sigmoid.default"}
    assert rewrites(graph, "fuse_attention")["mpc.attention"] == 1


@pytest.mark.parametrize("dynamic", [None, 2])
@pytest.mark.parametrize("shift", [False, True])
def test_an_appended_score(dynamic: int | None, shift: bool) -> None:
    def body(m, q, k, v):
        return appended(m, q, k, v, shift)

    graph = Graph(body, Q, K, V, dynamic=dynamic, sinks=SINKS)
    ops = rewrites(graph, *BEFORE, "fuse_attention")
    assert ops["mpc.attention"] == 1
    assert not set(ops) & {"aten.max.dim", "aten.cat.default", "aten.softmax.int"}


def test_a_public_sink_and_one_for_all_heads() -> None:
    """A softmax whose denominator is larger by one."""

    def body(m, q, k, v):
        scores = q @ k.transpose(2, 3) + m.mask
        whole = torch.cat([scores, m.zero.expand(1, 4, 5, 1)], -1)
        return torch.softmax(whole, -1)[..., :-1] @ v

    for zero in (torch.zeros(1), torch.zeros(4, 1, 1)):
        graph = Graph(body, Q, K, V, _mask=CAUSAL, _zero=zero.double())
        assert rewrites(graph, *BEFORE, "fuse_attention")["mpc.attention"] == 1


def test_near_miss_a_sum_that_keeps_its_dimension() -> None:
    def body(m, q, k, v):
        scores = q @ k.transpose(2, 3)
        left = (torch.logsumexp(scores, -1, keepdim=True) - m.sinks).sigmoid()
        return torch.softmax(scores, -1) @ v * left

    leaves(Graph(body, Q, K, V, sinks=normal(4, 1, 1)), *BEFORE, "unify_sinks")


def test_near_miss_heads_in_the_batch_dimension() -> None:
    def body(m, q, k, v):
        whole = torch.cat([q @ k.transpose(1, 2), m.sinks.expand(4, 5, 1)], -1)
        return torch.softmax(whole, -1)[..., :-1] @ v

    graph = Graph(body, Q[0], K[0], V[0], sinks=normal(4, 1, 1))
    leaves(graph, *BEFORE, "fuse_attention", reason="the scores come from aten.cat")

    def apart(m, q, k, v):
        scores = (q @ k.transpose(1, 2)).view(1, 4, 5, 5)
        weights = torch.softmax(torch.cat([scores, m.sinks.expand(1, 4, 5, 1)], -1), -1)
        return weights[..., :-1].reshape(4, 5, 5) @ v

    graph = Graph(apart, Q[0], K[0], V[0], sinks=normal(4, 1, 1))
    leaves(graph, *BEFORE, "fuse_attention", reason="part of the batch dimension")
