from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mergec.runtime.core.op import target
from tests.passes.harness import Graph, leaves, normal

NAMES = ("fuse_activations", "fuse_glu", "quadratic_gelu")
X, Y = normal(2, 3, 8), normal(2, 3, 8, seed=1)
SPELLINGS = {
    "erf": F.gelu,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick": lambda x: x * torch.sigmoid(1.702 * x),
}


def quadratic(x: torch.Tensor) -> torch.Tensor:
    return 0.125 * x**2 + 0.25 * x + 0.5


def run(graph: Graph, sites: int = 1) -> torch.Tensor:
    for name in NAMES[:-1]:
        graph.run(name)
    assert graph.run(NAMES[-1]) == sites
    text = graph.text
    assert graph.run(NAMES[-1]) == 0
    assert graph.text == text
    return graph()[0]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_alone(spelling: str) -> None:
    graph = Graph(lambda m, x: SPELLINGS[spelling](x), X)
    assert torch.allclose(run(graph), quadratic(X), atol=1e-12)
    assert graph.ops == {"mpc.quadratic": 1}


@pytest.mark.parametrize("spelling", ["erf", "tanh"])
def test_as_a_gate(spelling: str) -> None:
    graph = Graph(lambda m, x, y: SPELLINGS[spelling](x) * y, X, Y)
    assert torch.allclose(run(graph), quadratic(X) * Y, atol=1e-12)
    assert graph.ops == {"mpc.quadratic": 1, "aten.mul.Tensor": 1}
    (node,) = [n for n in graph.module.graph.nodes if n.target is target("quadratic")]
    assert node.args[1:] == (0.125, 0.25, 0.5)


def test_near_misses() -> None:
    leaves(Graph(lambda m, x: F.silu(x), X), *NAMES)
    leaves(Graph(lambda m, x: F.relu(x), X), *NAMES)
    leaves(Graph(lambda m, x, y: F.silu(x) * y, X, Y), *NAMES)
