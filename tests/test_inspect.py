"""Inspection tables, from a handmade cost report."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from compiler.cost import CostReport, CostRow
from compiler.inspect import Inspection, graph_text, inspect_costs, layer_of, readable
from runtime.spec import Cost, Vis
from tests.fixtures import tiny


@pytest.fixture
def inspection() -> Inspection:
    rows = [
        CostRow("e", "mpc.embedding", "model.embed", Vis.SHARED, (1, 4, 8), Cost(1, 400, 10)),
        CostRow("q", "mpc.linear", "model.layers.0.q", Vis.SHARED, (1, 4, 8), Cost(1, 200, 0)),
        CostRow("k", "mpc.linear", "model.layers.0.k", Vis.SHARED, (1, 4, 8), Cost(1, 200, 0)),
        CostRow("s", "mpc.silu", "model.layers.1.act", Vis.SHARED, (1, 4, 8), Cost(4, 150, 90)),
        CostRow("r", "mpc.reveal", "", Vis.CLIENT, (1, 4, 11), Cost(1, 50, 0)),
    ]
    report = CostReport(4, 0, rows, Cost(7, 1000, 100), ["e", "k", "s", "r"])
    passes = [{"pass": "fuse_norm", "sites": 3}]
    return inspect_costs(report, "tiny", passes, {"lossy": False})


def test_groups_add_up_to_the_total(inspection: Inspection) -> None:
    for rows in (inspection.by_op, inspection.by_layer):
        assert sum(r.count for r in rows) == 5
        assert sum(r.rounds for r in rows) == 7
        assert sum(r.online for r in rows) == 1000
        assert sum(r.offline for r in rows) == 100
        assert sum(r.share for r in rows) == pytest.approx(1.0)


def test_rounds_are_those_of_the_critical_path(inspection: Inspection) -> None:
    linear = next(r for r in inspection.by_op if r.key == "mpc.linear")
    assert (linear.count, linear.rounds, linear.online) == (2, 1, 400)


def test_order(inspection: Inspection) -> None:
    assert [r.key for r in inspection.by_op] == [
        "mpc.embedding", "mpc.linear", "mpc.silu", "mpc.reveal",
    ]  # fmt: skip
    assert [r.key for r in inspection.by_layer] == [
        "model.embed", "model.layers.0", "model.layers.1", "(model)",
    ]  # fmt: skip


def test_formats(inspection: Inspection) -> None:
    data = json.loads(inspection.to_json())
    assert data["total"]["online"] == 1000
    assert data["passes"] == [{"pass": "fuse_norm", "sites": 3}]
    markdown = inspection.to_markdown()
    assert "| mpc.linear | 2 | shared | 1 | 400 B | 0 B | 40.0% |" in markdown
    assert "| fuse_norm | 3 |" in markdown
    console = Console(width=120)
    with console.capture() as capture:
        console.print(inspection.render())
    assert "mpc.embedding" in capture.get()


def test_layers() -> None:
    assert layer_of("model.layers.11.self_attn.q_proj") == "model.layers.11"
    assert layer_of("transformer.h.0") == "transformer.h.0"
    assert layer_of("lm_head") == "lm_head"
    assert layer_of("") == "(model)"


def test_units() -> None:
    assert readable(812) == "812 B"
    assert readable(1204) == "1,204 B"
    assert readable(25_300) == "25.3 kB"
    assert readable(3_400_000) == "3.4 MB"
    assert readable(2.75e9) == "2.8 GB"


def test_graph_text() -> None:
    text = graph_text(tiny("client"))
    assert "%ids = input : client int64 1xnew\n" in text
    assert "%cache = input : shared float32 1x1xpastx8 -> cache.out\n" in text
    assert "%up.weight = constant : server float32 8x8\n" in text
    assert (
        "%norm = mpc.rms_norm(%embed, %norm.weight, 1e-06, 0.0) : shared f16"
        "  # model.layers.0  modeling.py:7\n" in text
    )
    assert text.endswith("return %logits, %cache.out\n")
    assert text == graph_text(tiny("server"))
