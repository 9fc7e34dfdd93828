from __future__ import annotations

import pytest
import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "expand_einsum"

EQUATIONS = {
    "bhid,bhjd->bhij": ((1, 2, 3, 4), (1, 2, 5, 4)),
    "bhij,bhjd->bhid": ((1, 2, 3, 5), (1, 2, 5, 4)),
    "bthd,bshd->bhts": ((1, 3, 2, 4), (1, 5, 2, 4)),
    "bhts,bshd->bthd": ((1, 2, 3, 5), (1, 5, 2, 4)),
    "btd,vd->btv": ((1, 3, 4), (6, 4)),
    "btd,dhk->bthk": ((1, 3, 4), (4, 2, 5)),
    "bthk,hkd->btd": ((1, 3, 2, 5), (2, 5, 4)),
    "ij, jk -> ki": ((2, 3), (3, 4)),
    "i,i->": ((3,), (3,)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_is_one_product(equation: str) -> None:
    left, right = EQUATIONS[equation]
    graph = Graph(
        lambda m, x, y: torch.einsum(equation, x, y), normal(*left), normal(*right, seed=1)
    )
    ops = rewrites(graph, NAME)
    assert ops["aten.matmul.default"] == 1
    assert set(ops) <= {"aten.matmul.default", "aten.permute.default", "aten.reshape.default"}


def test_any_number_of_tokens() -> None:
    w = normal(4, 2, 5)
    graph = Graph(
        lambda m, x: torch.einsum("btd,dhk->bthk", x, m.w), normal(1, 3, 4), dynamic=1, w=w
    )
    rewrites(graph, NAME)
    x = normal(1, 7, 4)
    graph.inputs = (x,)
    assert torch.allclose(graph()[0], torch.einsum("btd,dhk->bthk", x, w), atol=1e-12)


def test_near_misses() -> None:
    x = normal(3, 3)
    leaves(Graph(lambda m, x: torch.einsum("ii->i", x), x), NAME, reason="needs two operands")
    leaves(Graph(lambda m, x: torch.einsum("ij,jj->i", x, x), x), NAME, reason="a diagonal")
    leaves(Graph(lambda m, x: torch.einsum("ij,ij->ij", x, x), x), NAME, reason="it sums over")
    leaves(Graph(lambda m, x: torch.einsum("ij,jk->k", x, x), x), NAME, reason="it sums over")
    leaves(Graph(lambda m, x: torch.einsum("ij,jk", x, x), x), NAME, reason="needs two operands")
    leaves(Graph(lambda m, x: torch.einsum("ij,jk->ik", x, x), x, public=(0,)), NAME)
