from __future__ import annotations

import torch
import torch.nn.functional as F

from mergec.runtime.core.spec import Vis
from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "fuse_rms_norm", "fuse_layer_norm",
         "linear_to_dialect", "arithmetic_to_dialect", "fold_norm_affine")  # fmt: skip
X, G, B, W, V, C = (
    normal(1, 3, 8),
    normal(8),
    normal(8, seed=1),
    normal(5, 8),
    normal(4, 8),
    normal(5),
)


def rms(x, weight):
    return F.rms_norm(x, (8,), weight, 1e-6)


def norm_of(graph: Graph):
    (norm,) = [
        n for n in graph.module.graph.nodes if "_norm" in str(n.target) and n.op != "get_attr"
    ]
    return norm


def test_gain_of_an_rms_norm() -> None:
    graph = Graph(lambda m, x: F.linear(rms(x, m.g), m.w, m.c), X, g=G, w=W, c=C)
    assert rewrites(graph, *NAMES) == {"mpc.rms_norm": 1, "mpc.linear": 1}
    assert norm_of(graph).args[1:] == (None, 1e-6, 0.0)
    assert graph.info.constants["w_folded"] is Vis.SERVER


def test_gain_is_one_more_than_its_weight() -> None:
    def body(m, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.g)
        return F.linear(y, m.w)

    graph = Graph(body, X, g=G, w=W)
    rewrites(graph, *NAMES)
    assert norm_of(graph).args[1:] == (None, 1e-6, 0.0)


def test_gain_and_bias_of_a_layer_norm() -> None:
    """Into a layer with a bias and one without, which gets one."""

    def body(m, x):
        y = F.layer_norm(x, (8,), m.g, m.b)
        return F.linear(y, m.w, m.c), F.linear(y, m.v)

    graph = Graph(body, X, g=G, b=B, w=W, c=C, v=V)
    assert rewrites(graph, *NAMES) == {"mpc.layer_norm": 1, "mpc.linear": 2}
    assert norm_of(graph).args[1:3] == (None, None)
    assert set(graph.info.constants) == {"w_folded", "v_folded", "c_folded", "bias_folded"}


def test_bias_or_gain_alone() -> None:
    for body in (
        lambda m, x: F.linear(F.layer_norm(x, (8,), m.g), m.w),
        lambda m, x: F.linear(F.layer_norm(x, (8,), None, m.b), m.w),
    ):
        graph = Graph(body, X, g=G, b=B, w=W)
        rewrites(graph, *NAMES)
        assert norm_of(graph).args[1:3] == (None, None)


def test_rows_are_moved_on_the_way() -> None:
    def body(m, x):
        y = rms(x, m.g)
        return (
            F.linear(y.reshape(-1, 8), m.w),
            F.linear(y[:, -1:], m.v),
            F.linear(y.transpose(0, 1), m.u),
        )

    graph = Graph(body, X, g=G, w=W, v=V, u=normal(3, 8))
    assert rewrites(graph, *NAMES)["mpc.linear"] == 3


def test_near_miss_the_result_is_added() -> None:
    def body(m, x):
        y = rms(x, m.g)
        return F.linear(y, m.w), y + x

    leaves(Graph(body, X, g=G, w=W), *NAMES, reason="goes to mpc.add")


def test_near_miss_the_result_is_an_output() -> None:
    def body(m, x):
        y = rms(x, m.g)
        return F.linear(y, m.w), y

    leaves(Graph(body, X, g=G, w=W), *NAMES, reason="goes to output")


def test_near_miss_rows_are_cut() -> None:
    for body in (
        lambda m, x: F.linear(rms(x, m.g).reshape(1, 6, 4), m.v[:, :4]),
        lambda m, x: F.linear(rms(x, m.g).transpose(1, 2), m.u),
        lambda m, x: F.linear(rms(x, m.g)[..., :4], m.t),
    ):
        graph = Graph(body, X, g=G, u=normal(5, 3), t=normal(5, 4), v=V)
        leaves(graph, *NAMES, reason="cannot absorb the gain")


def test_near_miss_a_tied_matrix() -> None:
    def body(m, x):
        return F.linear(rms(F.linear(x, m.w), m.g), m.w)

    def twice(m, x):
        y = rms(x, m.g)
        return F.linear(y, m.w), F.linear(y, m.w) + 1.0

    for tied in (body, twice):
        leaves(Graph(tied, X, g=G, w=normal(8, 8)), *NAMES, reason="used elsewhere")


def test_near_miss_a_computed_gain() -> None:
    graph = Graph(lambda m, x: F.linear(rms(x, m.g * 2), m.w), X, g=G, w=W)
    leaves(graph, *NAMES, reason="is not a constant")


def test_near_miss_narrow_weights() -> None:
    def body(m, x):
        return F.linear(rms(x.bfloat16(), m.g), m.w).double()

    graph = Graph(body, X, g=G.bfloat16(), w=W.bfloat16())
    for name in NAMES[1:-1]:
        graph.run(name)
    assert graph.run(NAMES[-1]) == 0
    assert "32 bits" in graph.skips[0]


def test_without_a_gain_there_is_nothing_to_do() -> None:
    leaves(Graph(lambda m, x: F.linear(rms(x, None), m.w), X, w=W), *NAMES)
