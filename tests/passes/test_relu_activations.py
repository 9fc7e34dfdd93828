from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.passes.harness import Graph, leaves, normal

NAMES = ("fuse_activations", "fuse_glu", "relu_activations")
X, Y = normal(2, 3, 8), normal(2, 3, 8, seed=1)
ACTIVATIONS = {
    "gelu": (F.gelu, 0.17),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), 0.171),
    "silu": (F.silu, 0.28),
}


def run(graph: Graph) -> torch.Tensor:
    for name in NAMES[:-1]:
        graph.run(name)
    assert graph.run(NAMES[-1]) == 1
    text = graph.text
    assert graph.run(NAMES[-1]) == 0
    assert graph.text == text
    return graph()[0]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_alone_and_as_a_gate(kind: str) -> None:
    function, error = ACTIVATIONS[kind]
    graph = Graph(lambda m, x: function(x), X)
    assert torch.equal(run(graph), X.relu())
    assert graph.ops == {"mpc.relu": 1}
    assert float((graph.before[0] - X.relu()).abs().max()) < error
    graph = Graph(lambda m, x, y: function(x) * y, X, Y)
    assert torch.equal(run(graph), X.relu() * Y)
    assert graph.ops == {"mpc.glu": 1}


def test_near_misses() -> None:
    leaves(Graph(lambda m, x: F.relu(x), X), *NAMES)
    leaves(Graph(lambda m, x: torch.tanh(x), X), *NAMES)
    leaves(Graph(lambda m, x, y: F.relu(x) * y, X, Y), *NAMES)


def test_polynomials_that_were_asked_for_stay() -> None:
    graph = Graph(lambda m, x: F.gelu(x), X)
    for name in ("fuse_activations", "quadratic_gelu"):
        graph.run(name)
    assert graph.run("relu_activations") == 0
    assert graph.ops == {"mpc.quadratic": 1}
