"""The visibility of values, derived from the visibility of the inputs."""

from __future__ import annotations

import torch

from mergec.compiler.graph.visibility import annotate_visibility
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import target_name
from tests.families import captured
from tests.passes.harness import Graph, normal


def of(graph: Graph) -> dict[str, Vis]:
    return {
        target_name(node.target): node.meta["vis"]
        for node in graph.module.graph.nodes
        if node.op == "call_function"
    }


def test_join() -> None:
    p, c, s, h = Vis.PUBLIC, Vis.CLIENT, Vis.SERVER, Vis.SHARED
    table = {
        (p, p): p, (p, c): c, (p, s): s, (p, h): h, (c, c): c, (c, s): h, (c, h): h,
        (s, s): s, (s, h): h, (h, h): h,
    }  # fmt: skip
    for (a, b), joined in table.items():
        assert a.join(b) is b.join(a) is joined


def test_inputs_constants_and_what_is_made_of_them() -> None:
    ids = torch.tensor([1, 0])

    def body(m, ids, x):
        return ids + 1, m.w.exp(), m.t.neg(), m.w[ids], x.tanh(), m.w.sum(0) * m.t

    graph = Graph(body, ids, normal(2), w=normal(2, 2), _t=normal(2))
    assert of(graph) == {
        "aten.add.Tensor": Vis.CLIENT,
        "aten.exp.default": Vis.SERVER,
        "aten.neg.default": Vis.PUBLIC,
        "aten.index.Tensor": Vis.SHARED,
        "aten.tanh.default": Vis.SHARED,
        "aten.sum.dim_IntList": Vis.SERVER,
        "aten.mul.Tensor": Vis.SERVER,
    }


def test_sizes_are_public() -> None:
    graph = Graph(lambda m, x: x * x.shape[1] + torch.arange(x.shape[1]), normal(2, 3), dynamic=1)
    known = of(graph)
    assert known["aten.sym_size.int"] is Vis.PUBLIC
    assert known["aten.arange.default"] is Vis.PUBLIC
    assert known["aten.add.Tensor"] is Vis.SHARED


def test_revealed_values_are_the_clients() -> None:
    graph = Graph(lambda m, x: torch.tanh(x), normal(2, 3))
    graph.run("reveal_logits")
    assert of(graph) == {"mpc.reveal": Vis.CLIENT, "aten.tanh.default": Vis.CLIENT}


def test_masks_positions_and_tables_are_public() -> None:
    step = captured("llama")
    annotate_visibility(step.graph_module, step.inputs, step.constants)
    known = {}
    for node in step.graph_module.graph.nodes:
        known.setdefault(target_name(node.target), set()).add(node.meta.get("vis"))
    for name in ("aten.arange.default", "aten.cos.default", "aten.sin.default", "aten.le.Tensor"):
        assert known[name] == {Vis.PUBLIC}
    for name in ("aten.linear.default", "aten.softmax.int"):
        assert known[name] == {Vis.SHARED}
