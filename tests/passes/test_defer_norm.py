"""Scaling a product instead of its row: which networks and models it is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mergec import CompileConfig
from mergec.compiler.graph.paying import MOST
from mergec.compiler.pipeline import rewrite
from mergec.runtime.core.network import NETWORKS, Link, Network
from mergec.runtime.core.structural import target_name
from mergec.runtime.core.values import Shared, Weight
from mergec.runtime.engine.rehearsal import call_dealt
from mergec.runtime.ops.rms_norm_linear import RmsNormLinear
from tests.families import captured, slow
from tests.passes.harness import Graph, leaves, normal, rewrites

mpc = torch.ops.mpc


def norm(self: Any, x: torch.Tensor) -> Any:
    return mpc.linear(mpc.rms_norm(x, None, 1e-5), self.w)


def on(graph: Graph, network: Network) -> Graph:
    graph.info = replace(graph.info, network=network)
    return graph


def rows_of(graph: Graph) -> int:
    (node,) = [n for n in graph.module.graph.nodes if "norm_linear" in str(n.target)]
    return int(node.kwargs["rows"])


def test_on_one_machine_no_norm_waits() -> None:
    leaves(Graph(norm, normal(1, 3, 8), w=normal(5, 8)), "defer_norm", reason="takes no time")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_both_norms_keep_their_value(kind: str, bias: bool) -> None:
    def body(self: Any, x: torch.Tensor) -> Any:
        given = (x, None, None, 1e-5) if kind == "layer_norm" else (x, None, 1e-5)
        return mpc.linear(getattr(mpc, kind)(*given), self.w, self.b if bias else None)

    graph = Graph(body, normal(1, 3, 8) * 30 + 2, w=normal(5, 8), b=normal(5))
    ops = rewrites(on(graph, NETWORKS["wan"]), "defer_norm")
    assert ops == {f"mpc.{kind}_linear": 1}


def test_the_limit_of_rows_follows_the_network() -> None:
    """Rows are dearer where bandwidth is narrow, and rounds where the way is long."""
    limits = []
    for latency, bandwidth in ((2e-2, 1.25e7), (2e-2, 2.5e7), (4e-2, 2.5e7)):
        graph = Graph(norm, normal(1, 3, 64), w=normal(512, 64))
        link = Link(latency, bandwidth)
        rewrites(on(graph, Network(link, link, link)), "defer_norm")
        limits.append(rows_of(graph))
    assert limits == sorted(set(limits))
    assert 1 < limits[0] < limits[-1] < MOST


def test_the_limit_is_where_the_costs_meet() -> None:
    graph = Graph(norm, normal(1, 3, 64), w=normal(512, 64))
    network = NETWORKS["wan"]
    rewrites(on(graph, network), "defer_norm")
    (node,) = [n for n in graph.module.graph.nodes if "norm_linear" in str(n.target)]
    words = torch.empty((512, 64), dtype=torch.int64, device="meta")

    def weight(count: int, rows: int) -> float:
        x = Shared(words.new_empty((count, 64)), 32)
        held = Weight(words, words, words, 16)
        given, more = (x, held, None, 1e-6), {"rows": rows, "kept": 24}
        cost = RmsNormLinear.cost(*given, **more, fixed=16)
        return network.weight(cost, call_dealt(RmsNormLinear, 16, False, *given, **more))

    limit = int(node.kwargs["rows"])
    assert weight(limit, limit) < weight(limit, 0)
    assert weight(limit + 1, limit + 1) >= weight(limit + 1, 0)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", *slow("gpt_neox", "qwen2", "opt", "phi", "gemma")]
)
def test_whole_models_compute_the_same(family: str) -> None:
    """`check_passes` compares the graphs in float64, for a prompt and for a token onto a cache."""
    step = captured(family)
    reports = rewrite(step, CompileConfig(network="wan", check_passes=True))
    (report,) = [report for report in reports if report.name == "defer_norm"]
    names = [target_name(n.target) for n in step.graph_module.graph.nodes if n.op != "output"]
    assert report.sites == sum("norm_linear" in name for name in names) > 0
