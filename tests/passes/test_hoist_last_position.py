from __future__ import annotations

import torch
import torch.nn.functional as F

from mergec.runtime.core.structural import target_name
from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "fuse_attention", "fuse_activations", "fuse_glu",
         "fuse_rms_norm", "fuse_rotary", "linear_to_dialect", "arithmetic_to_dialect",
         "hoist_last_position")  # fmt: skip
X, Y, W, V, G = normal(1, 3, 8), normal(1, 3, 8, seed=4), normal(8, 8), normal(5, 8), normal(8)
COS, SIN = normal(1, 64, 4), normal(1, 64, 4, seed=5)


def made_from_last(graph: Graph, *shape: int) -> None:
    """Every call but the selections returns a value of one position."""
    for node in graph.module.graph.nodes:
        if target_name(node.target).startswith("mpc."):
            assert tuple(node.meta["val"].shape) == shape


def test_rows_are_worked_on_alone() -> None:
    def body(m, x, y):
        z = F.rms_norm(x, (8,), m.g, 1e-6) + y * 0.3
        z = F.linear(z, m.w)
        return (F.silu(z) * F.linear(x, m.w) + m.g)[:, -1:]

    graph = Graph(body, X, Y, dynamic=1, w=W, g=G)
    # Norm, scale, two linears, glu and two sums.
    ops = rewrites(graph, *NAMES, sites=7)
    assert ops["aten.slice.Tensor"] == 2
    made_from_last(graph, 1, 1, 8)


def heads(x):
    return x.reshape(1, x.shape[1], 2, 4).transpose(1, 2)


def test_one_query_looks_at_all_positions() -> None:
    def body(m, x):
        q, k, v = heads(F.linear(x, m.w)), heads(x), heads(x)
        length = x.shape[1]
        turned = torch.cat([-q[..., 2:], q[..., :2]], -1)
        q = q * m.cos[:, None, :length] + turned * m.sin[:, None, :length]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.where(seen, 0.0, -1e9)
        y = torch.softmax(q @ k.transpose(-1, -2) * 0.5 + mask, -1) @ v
        return F.linear(y.transpose(1, 2).reshape(1, length, 8), m.v)[:, -1:]

    graph = Graph(body, X, dynamic=1, w=W, v=V, _cos=COS, _sin=SIN)
    assert "mpc.attention" in graph_ops(graph)
    sites = {"mpc.linear": 2, "mpc.attention": 1, "mpc.rotary": 1, "moves": 4}
    rewrites(graph, NAMES[-1], sites=sum(sites.values()))
    (attention,) = [n for n in graph.module.graph.nodes if "attention" in str(n.target)]
    query, keys, _, mask = (node.meta["val"].shape for node in attention.args[:4])
    assert query[2] == mask[-2] == 1
    assert str(keys[2]) == str(mask[-1])


def graph_ops(graph: Graph) -> dict[str, int]:
    for name in NAMES[:-1]:
        graph.run(name)
    return graph.ops


def test_movement() -> None:
    for move in (
        lambda m, x: x.reshape(1, x.shape[1], 2, 4).transpose(1, 2)[:, :, -1:],
        lambda m, x: x.reshape(x.shape[1], 8)[-1:],
        lambda m, x: x[0].unsqueeze(0).unsqueeze(-1)[:, -1:],
        lambda m, x: x[..., :4].unsqueeze(1)[:, :, -1:],
        lambda m, x: torch.cat([x, x + 1.0], -1)[:, -1:],
    ):
        graph = Graph(lambda m, x, move=move: move(m, F.linear(x, m.w)), X, dynamic=1, w=W)
        graph_ops(graph)
        assert graph.run(NAMES[-1]) > 1
        assert graph.same()
        assert graph.run(NAMES[-1]) == 0
        made_from_last(graph, 1, 1, 8)


def test_other_lengths() -> None:
    """The graph is for any number of positions, one included."""
    graph = Graph(lambda m, x: F.linear(x, m.w)[:, -1:], X, dynamic=1, w=W)
    rewrites(graph, *NAMES)
    for length in (1, 2, 7):
        x = normal(1, length, 8)
        assert torch.allclose(graph.module(x)[0], F.linear(x, W)[:, -1:])


def test_near_miss_other_positions_are_used_too() -> None:
    def body(m, x):
        y = F.linear(x, m.w)
        return y[:, -1:], y * 2.0

    leaves(Graph(body, X, dynamic=1, w=W), *NAMES)


def test_near_miss_other_selections() -> None:
    for choose in (
        lambda y: y[:, -2:],
        lambda y: y[:, :1],
        lambda y: y[..., -1:],
        lambda y: y[:, -1],
        lambda y: y[:, -1:, 2:],
    ):
        graph = Graph(lambda m, x, choose=choose: choose(x.relu()), X, dynamic=1)
        if choose(X).shape == (1, 1, 6):
            rewrites(graph, *NAMES)
        else:
            leaves(graph, *NAMES)


def test_near_miss_positions_are_mixed() -> None:
    for mix in (
        lambda x: x.transpose(1, 2).reshape(1, x.shape[1], 8)[:, -1:],
        lambda x: torch.cat([x, x], 1)[:, -1:],
        lambda x: x.reshape(1, 2, x.shape[1], 4)[:, :, -1:],
    ):
        leaves(Graph(lambda m, x, mix=mix: mix(x), X, dynamic=1), *NAMES)


def test_near_miss_a_fixed_length() -> None:
    leaves(Graph(lambda m, x: F.linear(x, m.w)[:, -1:], X, w=W), *NAMES)
