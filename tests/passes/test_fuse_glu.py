from __future__ import annotations

import pytest
import torch.nn.functional as F

from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("fuse_activations", "fuse_glu")
X, Y = normal(2, 3, 8), normal(2, 3, 8, seed=1)
GATES = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("kind", GATES)
def test_either_order(kind: str) -> None:
    gate = GATES[kind]
    for body in (lambda m, x, y: gate(x) * y, lambda m, x, y: y * gate(x)):
        graph = Graph(body, X, Y)
        assert rewrites(graph, *NAMES) == {"mpc.glu": 1}
        (node,) = [n for n in graph.module.graph.nodes if "glu" in str(n.target)]
        assert node.args[2] == kind


def test_near_miss_the_activation_is_used_elsewhere() -> None:
    def body(m, x, y):
        active = F.silu(x)
        return active * y, active

    leaves(Graph(body, X, Y), *NAMES, reason="used elsewhere")


def test_near_miss_another_shape() -> None:
    graph = Graph(lambda m, x, y: F.silu(x) * y, X, Y[:, :, :1])
    leaves(graph, *NAMES, reason="differ in shape")


def test_near_misses() -> None:
    leaves(Graph(lambda m, x, y: F.silu(x) + y, X, Y), *NAMES)
    leaves(Graph(lambda m, x, y: F.tanh(x) * y, X, Y), *NAMES)
    leaves(Graph(lambda m, x, y: F.silu(x) * m.w, X, Y, w=normal(8)), *NAMES)
    leaves(Graph(lambda m, x, y: F.silu(x) * 2.0, X, Y), *NAMES)
