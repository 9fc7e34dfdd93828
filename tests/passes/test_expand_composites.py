from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "expand_composites"
X = normal(2, 3, 4) * 4.0
MASK = normal(2, 3, 4, seed=5) > 0

RULES: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "mT": (lambda m, x: x.mT, {"permute.default"}),
    "expand_as": (
        lambda m, x: x[:1].expand_as(x) + x, {"slice.Tensor", "expand.default", "add.Tensor"},
    ),
    "broadcast_to": (
        lambda m, x: torch.broadcast_to(x[:1], (2, 3, 4)), {"slice.Tensor", "expand.default"},
    ),
    "square": (lambda m, x: x.square(), {"pow.Tensor_Scalar"}),
    "clamp": (lambda m, x: x.clamp(-1.0, 2.0), {"sub.Tensor", "relu.default", "add.Tensor"}),
    "clamp_min": (lambda m, x: x.clamp(min=0.5), {"sub.Tensor", "relu.default", "add.Tensor"}),
    "clamp_zero": (lambda m, x: x.clamp_min(0.0), {"relu.default"}),
    "clamp_max": (lambda m, x: x.clamp_max(1.0), {"sub.Tensor", "relu.default"}),
    "relu6": (lambda m, x: F.relu6(x), {"sub.Tensor", "relu.default"}),
    "hardtanh": (lambda m, x: F.hardtanh(x), {"sub.Tensor", "relu.default", "add.Tensor"}),
    "leaky_relu": (lambda m, x: F.leaky_relu(x, 0.2), {"relu.default", "mul.Tensor", "add.Tensor"}),
    "hardsigmoid": (
        lambda m, x: F.hardsigmoid(x), {"sub.Tensor", "relu.default", "add.Tensor", "div.Tensor"},
    ),
    "hardswish": (
        lambda m, x: F.hardswish(x),
        {"sub.Tensor", "relu.default", "add.Tensor", "div.Tensor", "mul.Tensor"},
    ),
    "elu": (
        lambda m, x: F.elu(x, 0.5),
        {"sub.Tensor", "relu.default", "add.Tensor", "exp.default", "mul.Tensor"},
    ),
    "glu": (lambda m, x: F.glu(x, -1), {"slice.Tensor", "sigmoid.default", "mul.Tensor"}),
    "var": (
        lambda m, x: x.var(-1, keepdim=True),
        {"mean.dim", "sub.Tensor", "pow.Tensor_Scalar", "mul.Tensor"},
    ),
    "biased_var": (
        lambda m, x: x.var(-1, unbiased=False), {"mean.dim", "sub.Tensor", "pow.Tensor_Scalar"},
    ),
    "masked_fill": (
        lambda m, x: x.masked_fill(m.mask, -1e9), {"logical_not.default", "where.self"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_is_the_same_function(rule: str) -> None:
    body, wanted = RULES[rule]
    ops = rewrites(Graph(body, X, _mask=MASK), NAME)
    assert set(ops) == {f"aten.{name}" for name in wanted}


def test_infinite_fillings() -> None:
    def body(m, x):
        return torch.softmax(x.masked_fill(m.mask, float("-inf")), -1)

    mask = torch.ones(3, 4, dtype=torch.bool).triu(2)
    rewrites(Graph(body, X, _mask=mask), NAME)


def test_pieces_are_selected() -> None:
    def body(m, x):
        a, b = x.unbind(0)
        return a * b

    graph = Graph(body, X)
    assert rewrites(graph, NAME) == {"aten.select.int": 2, "aten.mul.Tensor": 1}


def test_in_place_forms() -> None:
    def body(m, x):
        return (x * 2.0).clamp_(-1.0, 1.0).masked_fill_(m.mask, 0.0)

    ops = rewrites(Graph(body, X, _mask=MASK), NAME, sites=2)
    assert "aten.clamp_.default" not in ops


def test_near_miss_a_mask_of_the_server() -> None:
    graph = Graph(lambda m, x: x.masked_fill(m.mask > 0, -1e9), X, mask=normal(2, 3, 4))
    leaves(graph, NAME, reason="persistent=False")


def test_near_miss_a_bound_that_is_a_tensor() -> None:
    graph = Graph(lambda m, x: torch.clamp(x, m.low, m.low + 1.0), X, low=normal(4))
    leaves(graph, NAME)


def test_near_miss_variance_of_another_dimension() -> None:
    leaves(Graph(lambda m, x: x.var(1), X), NAME, reason="no rule covers its options")


def test_near_miss_public_values() -> None:
    leaves(Graph(lambda m, x: x.clamp(0.0, 1.0).square().mT, X, public=(0,)), NAME)
