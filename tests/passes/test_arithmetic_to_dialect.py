from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "arithmetic_to_dialect")
X, Y = normal(2, 3, 8), normal(2, 3, 8, seed=1).abs() + 0.5
THREE = torch.tensor(3.0, dtype=torch.float64)

CASES: dict[str, tuple[Callable[..., torch.Tensor], dict[str, int]]] = {
    "x + y": (lambda m, x, y: x + y, {"mpc.add": 1}),
    "x - y": (lambda m, x, y: x - y, {"mpc.sub": 1}),
    "x * y": (lambda m, x, y: x * y, {"mpc.mul": 1}),
    "x / y": (lambda m, x, y: x / y, {"mpc.reciprocal": 1, "mpc.mul": 1}),
    "x + 2": (lambda m, x, y: x + 2, {"mpc.shift": 1}),
    "x - 2": (lambda m, x, y: x - 2, {"mpc.shift": 1}),
    "2 - x": (lambda m, x, y: 2 - x, {"mpc.scale": 1, "mpc.shift": 1}),
    "c - x": (lambda m, x, y: m.c - x, {"mpc.scale": 1, "mpc.shift": 1}),
    "x * 2": (lambda m, x, y: x * 2, {"mpc.scale": 1}),
    "c * x": (lambda m, x, y: m.c * x, {"mpc.scale": 1}),
    "x / 2": (lambda m, x, y: x / 2, {"mpc.scale": 1}),
    "x / c": (lambda m, x, y: x / m.c, {"mpc.scale": 1}),
    "2 / y": (lambda m, x, y: 2 / y, {"mpc.reciprocal": 1, "mpc.scale": 1}),
    "-x": (lambda m, x, y: -x, {"mpc.scale": 1}),
    "x ** 2": (lambda m, x, y: x**2, {"mpc.square": 1}),
    "x ** 3": (lambda m, x, y: x**3, {"mpc.square": 1, "mpc.mul": 1}),
    "exp": (lambda m, x, y: torch.exp(x), {"mpc.exp": 1}),
    "rsqrt": (lambda m, x, y: torch.rsqrt(y), {"mpc.rsqrt": 1}),
    "tanh": (lambda m, x, y: torch.tanh(x), {"mpc.tanh": 1}),
    "softmax": (lambda m, x, y: torch.softmax(x, 2), {"mpc.softmax": 1}),
    "sum": (lambda m, x, y: x.sum(-1, keepdim=True), {"mpc.sum": 1}),
    "mean": (lambda m, x, y: x.mean(2, keepdim=True), {"mpc.sum": 1, "mpc.scale": 1}),
    "matmul": (
        lambda m, x, y: x @ y.transpose(1, 2),
        {"aten.permute.default": 1, "mpc.matmul": 1},
    ),
    "x + w": (lambda m, x, y: x + m.w, {"mpc.add": 1}),
    "x * table": (lambda m, x, y: x * m.t, {"mpc.mul": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_arithmetic(case: str) -> None:
    body, ops = CASES[case]
    graph = Graph(body, X, Y, _c=THREE, w=normal(8), _t=normal(8, seed=2))
    for needed in NAMES[:-1]:
        graph.run(needed)
    sites = 2 if case == "2 / y" else 1
    assert rewrites(graph, NAMES[-1], sites=sites) == ops


def test_near_miss_public_numbers() -> None:
    leaves(Graph(lambda m, x: torch.exp(x) * 2.0 + x, X, public=(0,)), *NAMES)


def test_near_miss_other_dimensions() -> None:
    leaves(Graph(lambda m, x: torch.softmax(x, 1), X), *NAMES)
    for body in (
        lambda m, x: x.sum(1, keepdim=True),
        lambda m, x: x.mean(-1),
        lambda m, x: x.sum((1, 2), keepdim=True),
    ):
        leaves(Graph(body, X), *NAMES, reason="does not reduce the last dimension alone")


def test_near_miss_a_number_that_adds_dimensions() -> None:
    for body in (lambda m, x: x * m.c, lambda m, x: m.c + x, lambda m, x: x - m.c):
        graph = Graph(body, X, _c=THREE.reshape(1, 1, 1, 1))
        assert not set(rewrites(graph, *NAMES)) & {"mpc.scale", "mpc.shift"}


def test_near_miss_no_protocol() -> None:
    for body in (
        lambda m, x: torch.sqrt(x),
        lambda m, x: x**0.5,
        lambda m, x: x.abs(),
        lambda m, x: torch.sort(x)[0],
    ):
        leaves(Graph(body, Y), *NAMES)
