from __future__ import annotations

import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "fuse_rotary")
X = normal(1, 2, 3, 8)
COS, SIN = normal(3, 8, seed=1), normal(3, 8, seed=2)


def halves(x):
    middle = x.shape[-1] // 2
    return torch.cat([-x[..., middle:], x[..., :middle]], -1)


def neighbours(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def test_halves_and_neighbours() -> None:
    for turn in (halves, neighbours):
        for body in (
            lambda m, x, t=turn: x * m.cos + t(x) * m.sin,
            lambda m, x, t=turn: m.sin * t(x) + m.cos * x,
        ):
            graph = Graph(body, X, _cos=COS, _sin=SIN)
            assert rewrites(graph, *NAMES) == {"mpc.rotary": 1}
            (node,) = [n for n in graph.module.graph.nodes if "rotary" in str(n.target)]
            assert node.args[3] is (turn is neighbours)


def test_part_of_the_features() -> None:
    def body(m, x):
        rot, rest = x[..., :4], x[..., 4:]
        return torch.cat([rot * m.cos + halves(rot) * m.sin, rest], -1)

    graph = Graph(body, X, _cos=COS[:, :4], _sin=SIN[:, :4])
    assert rewrites(graph, *NAMES) == {"mpc.rotary": 1}


def test_near_miss_the_rest_is_changed() -> None:
    def body(m, x):
        rot, rest = x[..., :4], x[..., 4:]
        return torch.cat([rot * m.cos + halves(rot) * m.sin, rest * 2.0], -1)

    ops = rewrites(Graph(body, X, _cos=COS[:, :4], _sin=SIN[:, :4]), *NAMES)
    assert ops["mpc.rotary"] == 1
    assert ops["aten.cat.default"] == 1


def test_near_misses() -> None:
    for turn in (
        lambda x: torch.cat([x[..., 4:], x[..., :4]], -1),
        lambda x: torch.cat([-x[..., :4], x[..., 4:]], -1),
        lambda x: torch.cat([-x[..., 3:], x[..., :3]], -1),
        lambda x: torch.stack([x[..., ::2], -x[..., 1::2]], -1).flatten(-2),
        lambda x: torch.stack([-x[..., 4:], x[..., :4]], -1).flatten(-2),
    ):
        graph = Graph(lambda m, x, t=turn: x * m.cos + t(x) * m.sin, X, _cos=COS, _sin=SIN)
        leaves(graph, *NAMES)


def test_near_miss_secret_tables() -> None:
    leaves(Graph(lambda m, x: x * m.cos + halves(x) * m.sin, X, cos=COS, sin=SIN), *NAMES)


def test_near_miss_another_row_is_turned() -> None:
    graph = Graph(lambda m, x, y: x * m.cos + halves(y) * m.sin, X, X + 1, _cos=COS, _sin=SIN)
    leaves(graph, *NAMES)


def test_near_miss_one_number_for_all_features() -> None:
    graph = Graph(lambda m, x: x * m.cos + halves(x) * m.sin, X, _cos=COS[:, :1], _sin=SIN[:, :1])
    leaves(graph, *NAMES, reason="not as wide as its operand")


def test_near_miss_subtracted() -> None:
    graph = Graph(lambda m, x: x * m.cos - halves(x) * m.sin, X, _cos=COS, _sin=SIN)
    leaves(graph, *NAMES)
