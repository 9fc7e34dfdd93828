from __future__ import annotations

import pytest
import torch.nn.functional as F

from mergec.compiler.config import CompileConfig
from mergec.compiler.frontend.capture import capture
from mergec.compiler.graph.ir import aten, calls
from mergec.compiler.graph.weights import insert_folded
from mergec.compiler.pipeline import assemble, to_dialect
from mergec.passes import merge_siblings
from mergec.runtime.core.spec import Vis
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.roles.inprocess import InProcessSession
from tests.families import LAYERS, random_decoder
from tests.passes.harness import Graph, leaves, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "fuse_activations", "fuse_glu", "linear_to_dialect",
         "arithmetic_to_dialect", "merge_siblings")  # fmt: skip
X, W, V, U, B, C = (
    normal(1, 3, 8),
    normal(5, 8),
    normal(4, 8),
    normal(4, 8, seed=2),
    normal(5),
    normal(4),
)


def test_with_and_without_bias() -> None:
    def body(m, x):
        return F.linear(x, m.w, m.b), F.linear(x, m.v), F.linear(x, m.u, m.c) * 0.3

    graph = Graph(body, X, w=W, v=V, u=U, b=B, c=C)
    assert rewrites(graph, *NAMES) == {"mpc.linear": 1, "aten.slice.Tensor": 3, "mpc.scale": 1}
    assert graph.info.constants == {"w_folded": Vis.SERVER, "b_folded": Vis.SERVER}
    assert list(graph.module.w_folded.shape) == [13, 8]


def test_gate_and_up() -> None:
    graph = Graph(lambda m, x: F.silu(F.linear(x, m.v)) * F.linear(x, m.u), X, v=V, u=U)
    assert rewrites(graph, *NAMES) == {"mpc.linear": 1, "aten.slice.Tensor": 2, "mpc.glu": 1}


def test_no_site_keeps_the_matrices_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(m, x):
        y = x + 1.0
        return F.linear(x, m.w), F.linear(x, m.v), F.linear(y, m.u), F.linear(y, m.t)

    graph, present = Graph(body, X, w=W, v=V, u=U, t=normal(3, 8)), []

    def insert(graph_module, *arguments):
        present.append({name for name in "wvut" if hasattr(graph_module, name)})
        return insert_folded(graph_module, *arguments)

    monkeypatch.setattr(merge_siblings, "insert_folded", insert)
    rewrites(graph, *NAMES, sites=2)
    assert present == [{"w", "v", "u", "t"}, {"u", "t"}]


def test_each_input_has_its_own() -> None:
    def body(m, x):
        y = x + 1.0
        return F.linear(x, m.w), F.linear(x, m.v), F.linear(y, m.u), F.linear(y, m.t)

    graph = Graph(body, X, w=W, v=V, u=U, t=normal(3, 8))
    assert rewrites(graph, *NAMES, sites=2)["mpc.linear"] == 2


def test_a_sibling_after_a_consumer() -> None:
    """The product comes before the first of them, and so before all of their users."""

    def body(m, x):
        y = F.linear(x, m.v).relu()
        return y * F.linear(x, m.u)

    assert rewrites(Graph(body, X, v=V, u=U), *NAMES)["mpc.linear"] == 1


def test_near_miss_other_inputs() -> None:
    leaves(Graph(lambda m, x, y: F.linear(x, m.v) + F.linear(y, m.u), X, X + 1, v=V, u=U), *NAMES)


def test_near_miss_an_only_child() -> None:
    leaves(Graph(lambda m, x: F.linear(x, m.v) + x[..., :4], X, v=V), *NAMES)


def test_near_miss_a_tied_matrix() -> None:
    def body(m, x):
        return F.linear(x, m.v), F.linear(x + 1.0, m.v), F.linear(x, m.u)

    leaves(Graph(body, X, v=V, u=U), *NAMES, reason="used elsewhere")


def test_near_miss_narrow_weights() -> None:
    def body(m, x):
        y = x.bfloat16()
        return (F.linear(y, m.v) + F.linear(y, m.u)).double()

    graph = Graph(body, X, v=V.bfloat16(), u=U.bfloat16())
    for name in NAMES[1:-1]:
        graph.run(name)
    assert graph.run(NAMES[-1]) == 0
    assert all("32 bits" in reason for reason in graph.skips)


@pytest.mark.parametrize("weights", ["server", "shared"])
def test_each_part_has_the_bits_that_it_has_room_for(weights: str) -> None:
    """The values' range is so large that their matrix gets fewer fractional bits than the keys'."""
    config = CompileConfig(weights=weights, max_length=64, logit_noise=0.0)
    dialect = to_dialect(capture(random_decoder("qwen2").float()), config)
    values = [n for n in dialect.graph_module.graph.nodes if "v_proj" in n.meta.get("module", "")]
    cut = [n for n in values if calls(n, aten.slice.Tensor)]
    assert len(cut) == LAYERS
    for node in cut:
        node.meta["range"] = (0.0, 2.0**23)
    roles = assemble(dialect, config)
    products = [i for i in roles["client"].instructions if i.target == "mpc.linear"]
    found = [i.args[4][1::2] for i in products if len(i.args) > 4 and "self_attn" in i.args[1].name]
    assert [sorted(set(bits)) for bits in found] == [[0, 2]] * LAYERS
    plain = PlainExecutor(roles["server"])
    ((_, wanted),) = plain.generate([3, 14, 15], 1, lambda _: 0)
    with InProcessSession(roles) as session:
        logits = session.step([3, 14, 15], 0)
    assert float((logits - wanted).abs().max()) < 2e-3
