from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.passes.harness import Graph, leaves, normal

NAMES = ("fuse_activations", "fuse_glu", "quadratic_silu")
X, Y = normal(2, 3, 8), normal(2, 3, 8, seed=1)


def quadratic(x: torch.Tensor) -> torch.Tensor:
    return 0.25 * x**2 + 0.5 * x


def run(graph: Graph) -> torch.Tensor:
    for name in NAMES[:-1]:
        graph.run(name)
    assert graph.run(NAMES[-1]) == 1
    text = graph.text
    assert graph.run(NAMES[-1]) == 0
    assert graph.text == text
    return graph()[0]


def test_alone() -> None:
    graph = Graph(lambda m, x: F.silu(x), X)
    assert torch.allclose(run(graph), quadratic(X), atol=1e-12)
    assert graph.ops == {"mpc.quadratic": 1}


def test_as_a_gate() -> None:
    graph = Graph(lambda m, x, y: y * F.silu(x), X, Y)
    assert torch.allclose(run(graph), quadratic(X) * Y, atol=1e-12)
    assert graph.ops == {"mpc.quadratic": 1, "aten.mul.Tensor": 1}


def test_the_error_is_the_stated_one() -> None:
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert float((F.silu(x) - quadratic(x)).abs().max()) < 0.04


def test_near_misses() -> None:
    leaves(Graph(lambda m, x: F.gelu(x), X), *NAMES)
    leaves(Graph(lambda m, x: torch.sigmoid(x), X), *NAMES)
    leaves(Graph(lambda m, x, y: F.gelu(x) * y, X, Y), *NAMES)
