from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mergec.runtime.core.op import target
from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "fuse_activations")
X = normal(2, 3, 8)
ROOT = math.sqrt(2 / math.pi)

SPELLINGS = {
    "gelu": (F.gelu, "mpc.gelu", (False,)),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), "mpc.gelu", (True,)),
    "erf": (lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), "mpc.gelu", (False,)),
    "gpt2": (
        lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
        "mpc.gelu",
        (True,),
    ),
    "bloom": (
        lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
        "mpc.gelu",
        (True,),
    ),
    "silu": (F.silu, "mpc.silu", ()),
    "swish": (lambda x: torch.sigmoid(x) * x, "mpc.silu", ()),
    "quick": (lambda x: x * torch.sigmoid(1.702 * x), "mpc.quick_gelu", ()),
    "relu": (F.relu, "mpc.relu", ()),
    "elu": (F.elu, "mpc.elu", ()),
    "tanh": (torch.tanh, "mpc.tanh", ()),
    "sigmoid": (torch.sigmoid, "mpc.sigmoid", ()),
    "mish": (F.mish, "mpc.mish", ()),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    body, name, options = SPELLINGS[spelling]
    graph = Graph(lambda m, x: body(x * 2.0) + 1.0, X)
    for needed in NAMES[:-1]:
        graph.run(needed)
    assert graph.run(NAMES[-1]) == 1
    assert (
        max(float((a - b).abs().max()) for a, b in zip(graph.before, graph(), strict=True)) < 1e-7
    )
    assert graph.ops == {"aten.mul.Tensor": 1, name: 1, "aten.add.Tensor": 1}
    (node,) = [n for n in graph.module.graph.nodes if n.target is target(name[4:])]
    assert node.args[1:] == options
    assert graph.run(NAMES[-1]) == 0


def test_near_miss_another_constant() -> None:
    for body in (
        lambda x: x * torch.sigmoid(1.7 * x),
        lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.0447 * x**3))),
        lambda x: x * 0.5 * (1 + torch.erf(x / 1.4)),
        lambda x: x * torch.sigmoid(x) + 1e-5,
    ):
        graph = Graph(lambda m, x, f=body: f(x), X)
        for name in NAMES:
            graph.run(name)
        assert not set(graph.ops) & {"mpc.gelu", "mpc.quick_gelu"}
        assert graph.same()


def test_near_miss_another_elu() -> None:
    for body in (lambda x: F.elu(x, 0.5), F.selu):
        graph = Graph(lambda m, x, f=body: f(x), X)
        assert graph.run("fuse_activations") == 0
        assert graph.same()


def test_near_miss_two_inputs() -> None:
    graph = Graph(lambda m, x, y: y * torch.sigmoid(x), X, X + 1)
    assert rewrites(graph, *NAMES) == {"mpc.sigmoid": 1, "aten.mul.Tensor": 1}


def test_near_miss_the_inner_value_is_used_elsewhere() -> None:
    def body(m, x):
        gate = torch.sigmoid(x)
        return gate * x, gate

    graph = Graph(body, X)
    assert rewrites(graph, *NAMES) == {"mpc.sigmoid": 1, "aten.mul.Tensor": 1}


def test_near_miss_no_protocol() -> None:
    """An erf by itself, and functions without an op, stay as they are."""
    for body in (torch.erf, F.softplus, F.leaky_relu):
        leaves(Graph(lambda m, x, f=body: f(x), X), *NAMES)


def test_near_miss_public_numbers() -> None:
    leaves(Graph(lambda m, x: F.silu(x) + torch.tanh(x), X, public=(0,)), *NAMES)
