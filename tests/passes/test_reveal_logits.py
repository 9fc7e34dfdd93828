from __future__ import annotations

import torch

from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "reveal_logits"
X, W = normal(1, 3, 4), normal(5, 4)


def linear(m, x):
    return torch.nn.functional.linear(x, m.w)


def first_of(graph: Graph) -> str:
    """The call that computes the revealed value."""
    (reveal,) = [n for n in graph.module.graph.nodes if "reveal" in str(n.target)]
    return str(reveal.args[0].target)


def test_a_softcap_is_the_clients() -> None:
    graph = Graph(lambda m, x: torch.tanh(linear(m, x)[:, -3:] / 30.0) * 30.0, X, w=W)
    ops = rewrites(graph, "remove_noops", "unify_spellings", NAME)
    assert ops["mpc.reveal"] == 1
    assert first_of(graph) == "aten.linear.default"


def test_without_a_softcap() -> None:
    graph = Graph(linear, X, w=W)
    assert rewrites(graph, NAME) == {"aten.linear.default": 1, "mpc.reveal": 1}


def test_nothing_secret() -> None:
    leaves(Graph(lambda m, x: x * m.t, X, public=(0,), _t=X), NAME)


def test_near_miss_the_capped_value_is_used_elsewhere() -> None:
    def body(m, x):
        y = torch.tanh(linear(m, x))
        return y, y * 2.0

    graph = Graph(body, X, w=W)
    assert rewrites(graph, NAME)["mpc.reveal"] == 1
    assert first_of(graph) == "aten.tanh.default"


def test_near_miss_other_rows_stay_secret() -> None:
    graph = Graph(lambda m, x: torch.tanh(linear(m, x)[:, -1:]), X, w=W)
    assert rewrites(graph, NAME)["mpc.reveal"] == 1
    assert first_of(graph) == "aten.slice.Tensor"


def test_near_miss_not_invertible() -> None:
    """A softmax, or a product with a weight, reveals less than its operand."""
    for body in (
        lambda m, x: torch.softmax(linear(m, x), -1),
        lambda m, x: linear(m, x) * m.gain,
        lambda m, x: linear(m, x) * 0.0,
        lambda m, x: torch.relu(linear(m, x)),
    ):
        graph = Graph(body, X, w=W, gain=normal(5))
        assert graph.run(NAME) == 1
        assert first_of(graph) != "aten.linear.default"
        assert graph.same()


def test_the_token_alone_takes_the_whole_logits() -> None:
    """The client cannot compute the softcap then, because it does not get the logits."""
    graph = Graph(lambda m, x: torch.tanh(linear(m, x) / 30.0) * 30.0, X, w=W)
    graph.info.reveal = "token"
    wanted = graph.before[0].argmax(-1)
    assert graph.run(NAME) == 1
    assert "aten.tanh.default" in graph.ops
    assert graph.ops["mpc.reveal_token"] == 1
    assert torch.equal(graph()[0], wanted)
