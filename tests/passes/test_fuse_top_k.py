"""Gates of mixtures of experts: both ways to divide them by their sum, and none, at any length."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

BEFORE = ("remove_noops", "unify_spellings")
LOGITS = normal(1, 5, 8)
UNKNOWN = "its weights are not known functions"


def scattered(index: torch.Tensor, weights: torch.Tensor, size: int = 8) -> torch.Tensor:
    zeros = weights.new_zeros(*weights.shape[:-1], size)
    return zeros.scatter(-1, index, weights)


def divided(m: Any, x: torch.Tensor) -> torch.Tensor:
    """mixtral, and qwen3_moe with norm_topk_prob."""
    values, index = torch.topk(torch.softmax(x, -1), 3, dim=-1)
    values /= values.sum(dim=-1, keepdim=True)
    return scattered(index, values)


def chosen_first(m: Any, x: torch.Tensor) -> torch.Tensor:
    """gpt_oss."""
    values, index = torch.topk(x, 3, dim=-1)
    return scattered(index, torch.softmax(values, dim=2))


def as_they_are(m: Any, x: torch.Tensor) -> torch.Tensor:
    """olmoe, and qwen2_moe without norm_topk_prob."""
    values, index = torch.topk(torch.softmax(x, dim=-1, dtype=torch.float64), 3, dim=-1)
    return scattered(index, values.to(torch.float64))


@pytest.mark.parametrize("dynamic", [None, 1])
@pytest.mark.parametrize("gates", [divided, chosen_first])
def test_weights_that_add_up_to_one(gates: Callable[..., Any], dynamic: int | None) -> None:
    graph = Graph(gates, LOGITS, dynamic=dynamic)
    ops = rewrites(graph, *BEFORE, "fuse_top_k")
    assert ops == {
        "mpc.top_k": 1, "aten.mul.Tensor": 1, "aten.add.Tensor": 1, "aten.softmax.int": 1
    }  # fmt: skip


def test_weights_as_they_are() -> None:
    ops = rewrites(Graph(as_they_are, LOGITS), *BEFORE, "fuse_top_k")
    assert ops == {"aten.softmax.int": 1, "mpc.top_k": 1, "aten.mul.Tensor": 1}


def test_sigmoids() -> None:
    """cohere2_moe. They are compared before the sigmoid, where none are equal."""

    def body(m, x):
        values, index = torch.sigmoid(x).topk(3)
        return scattered(index, values)

    graph = Graph(body, LOGITS)
    ops = rewrites(graph, *BEFORE, "fuse_top_k")
    assert ops == {"aten.sigmoid.default": 1, "mpc.top_k": 1, "aten.mul.Tensor": 1}
    assert "mpc.top_k(%sigmoid" not in graph.text


def test_weights_of_other_scores_than_those_compared() -> None:
    """minimax_m2, and deepseek_v3 without groups: a bias takes part in the choice alone."""

    def body(m, x):
        scores = torch.sigmoid(x)
        index = torch.topk(scores + m.bias, 3, dim=-1, sorted=False)[1]
        weights = scores.gather(-1, index)
        weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
        return scattered(index, weights * 2.5)

    graph = Graph(body, LOGITS, bias=normal(8, seed=1))
    ops = rewrites(graph, *BEFORE, "fuse_top_k")
    assert ops == {
        "aten.sigmoid.default": 1, "aten.add.Tensor": 1, "mpc.top_k": 1, "aten.mul.Tensor": 2,
        "aten.sum.dim_IntList": 1, "aten.div.Tensor": 1,
    }  # fmt: skip


def test_sums_that_are_kept_above_a_tiny_number() -> None:
    """ernie4_5_moe."""

    def body(m, x):
        scores = torch.softmax(x, 1)
        index = torch.topk(scores + m.bias, 3)[1]
        weights = scores.gather(-1, index)
        return scattered(index, weights / torch.clamp(weights.sum(-1, keepdim=True), min=1e-12))

    graph = Graph(body, normal(5, 8), bias=normal(8, seed=1))
    ops = rewrites(graph, *BEFORE, "expand_composites", "fuse_top_k")
    assert (ops["mpc.top_k"], ops["aten.div.Tensor"]) == (1, 1)
    assert not any("relu" in op for op in ops)


def test_near_miss_a_clamp_of_a_sum_that_may_be_negative() -> None:
    def body(m, x):
        values, index = torch.topk(x, 3)
        return scattered(index, values / torch.clamp(values.sum(-1, keepdim=True), min=1e-12))

    leaves(Graph(body, LOGITS), *BEFORE, "expand_composites", "fuse_top_k", reason=UNKNOWN)


def test_probabilities_of_other_scores_than_those_compared() -> None:
    """A bias may choose those that are almost zero, which no softmax of all would show."""
    logits = torch.tensor([[[0.0, -90.0, -91.0, -1.0]]], dtype=torch.float64)

    def body(m, x):
        weights = torch.softmax(x, -1)
        index = torch.topk(weights + m.bias, 2)[1]
        chosen = weights.gather(-1, index)
        return scattered(index, chosen / chosen.sum(-1, keepdim=True), 4)

    bias = torch.tensor([0.0, 5.0, 6.0, 0.0], dtype=torch.float64)
    ops = rewrites(Graph(body, logits, bias=bias), *BEFORE, "fuse_top_k")
    assert (ops["aten.softmax.int"], ops["aten.div.Tensor"]) == (1, 1)


def test_chosen_are_far_apart() -> None:
    """A chosen expert's weight may be tiny, but that of no other expert is."""
    logits = torch.tensor([[[0.0, 30.0, -30.0, -1.0]]], dtype=torch.float64)

    def body(m, x):
        values, index = torch.softmax(x, -1).topk(2)
        return scattered(index, values / values.sum(-1, keepdim=True), 4)

    rewrites(Graph(body, logits), *BEFORE, "fuse_top_k")


def test_near_miss_the_smallest() -> None:
    def body(m, x):
        values, index = torch.topk(x, 3, largest=False)
        return scattered(index, values)

    graph = Graph(body, LOGITS)
    leaves(graph, *BEFORE, "fuse_top_k", reason="it does not scatter to the largest entries")


def test_near_miss_more_columns() -> None:
    def body(m, x):
        values, index = torch.topk(x, 3)
        return scattered(index, values, 9)

    graph = Graph(body, LOGITS)
    leaves(graph, *BEFORE, "fuse_top_k", reason="it does not scatter to the largest entries")


def test_near_miss_divided_by_the_sum_of_all() -> None:
    def body(m, x):
        weights = torch.softmax(x, -1)
        values, index = torch.topk(weights, 3)
        return scattered(index, values / weights.sum(-1, keepdim=True))

    leaves(Graph(body, LOGITS), *BEFORE, "fuse_top_k", reason=UNKNOWN)


def test_near_miss_divided_by_more_than_the_sum() -> None:
    def body(m, x):
        values, index = torch.topk(torch.softmax(x, -1), 3)
        return scattered(index, values / (values.sum(-1, keepdim=True) + 0.5))

    leaves(Graph(body, LOGITS), *BEFORE, "fuse_top_k", reason=UNKNOWN)


def test_near_miss_entries_at_other_places() -> None:
    def body(m, x):
        index = torch.topk(x, 3)[1]
        other = torch.topk(x, 3, largest=False)[1]
        return scattered(index, x.gather(-1, other))

    leaves(Graph(body, LOGITS), *BEFORE, "fuse_top_k", reason=UNKNOWN)


def test_near_miss_a_wider_row() -> None:
    """The places are those of a part of the row, so they are right in it, but not as many."""

    def body(m, x):
        index = torch.topk(x[..., :6], 3)[1]
        return scattered(index, x.gather(-1, index), 6)

    leaves(Graph(body, LOGITS), *BEFORE, "fuse_top_k", reason=UNKNOWN)


def limited(
    m: Any, x: torch.Tensor, *, groups: int = 4, chosen: int = 2, fill: float = -math.inf
) -> torch.Tensor:
    """deepseek_v3: the largest entries of those groups whose two largest have the largest sums."""
    scores = torch.sigmoid(x)
    compared = scores + m.bias
    size = x.shape[-1] // groups
    sums = compared.reshape(-1, groups, size).topk(2, dim=-1)[0].sum(dim=-1)
    index = torch.topk(sums, k=chosen, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(sums).scatter_(1, index, 1)
    mask = mask.unsqueeze(-1).expand(-1, groups, size).reshape(-1, x.shape[-1])
    compared = compared.masked_fill(~mask.bool(), fill)
    index = torch.topk(compared, k=3, dim=-1, sorted=False)[1]
    weights = scores.gather(1, index)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return scattered(index, weights * 2.5, x.shape[-1])


BIAS = normal(12, seed=1)
MANY = normal(40, 12)


@pytest.mark.parametrize("dynamic", [None, 0])
@pytest.mark.parametrize(("groups", "chosen"), [(4, 2), (4, 3), (2, 1), (6, 2), (3, 1)])
def test_entries_of_some_groups(groups: int, chosen: int, dynamic: int | None) -> None:
    """Groups of two entries add up all; others add up the two that `mpc.top_k` finds."""
    body = functools.partial(limited, groups=groups, chosen=chosen)
    ops = rewrites(Graph(body, MANY, dynamic=dynamic, bias=BIAS), *BEFORE, "fuse_top_k")
    assert ops["mpc.top_k"] == (2 if groups == 6 else 3)
    assert not {op for op in ops if "masked_fill" in op or "topk" in op or "scatter" in op}


@pytest.mark.parametrize(("groups", "chosen"), [(1, 1), (3, 3)])
def test_entries_of_all_groups(groups: int, chosen: int) -> None:
    """glm4_moe has one group by default."""
    body = functools.partial(limited, groups=groups, chosen=chosen)
    ops = rewrites(Graph(body, MANY, bias=BIAS), *BEFORE, "fuse_top_k")
    assert ops["mpc.top_k"] == 1


FILLED = "what is filled in is not the groups"


def test_near_miss_filled_with_a_number_that_may_be_chosen() -> None:
    graph = Graph(functools.partial(limited, fill=0.0), MANY, bias=BIAS)
    leaves(graph, *BEFORE, "fuse_top_k", reason=FILLED)


def test_near_miss_scores_that_are_far_apart() -> None:
    leaves(Graph(limited, MANY, bias=BIAS * 30), *BEFORE, "fuse_top_k", reason=FILLED)


def test_near_miss_the_chosen_groups_are_filled() -> None:
    def body(m, x):
        sums = torch.sigmoid(x).reshape(-1, 4, 3).topk(2, dim=-1)[0].sum(dim=-1)
        mask = torch.zeros_like(sums).scatter_(1, sums.topk(2)[1], 1)
        mask = mask.unsqueeze(-1).expand(-1, 4, 3).reshape(-1, 12)
        values, index = torch.sigmoid(x).masked_fill(mask.bool(), -math.inf).topk(3)
        return scattered(index, values, 12)

    leaves(Graph(body, MANY), *BEFORE, "fuse_top_k", reason=FILLED)
