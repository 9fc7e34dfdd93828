"""Inspection tables, from a handmade cost report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from mergec.compiler.backend.cost import CostReport, CostRow
from mergec.compiler.errors import CompileError
from mergec.compiler.report.inspect import (
    Inspection,
    inspect_costs,
)
from mergec.compiler.report.rows import PassRow
from mergec.compiler.report.text import graph_text, readable
from mergec.compiler.text import layer_of
from mergec.runtime.core.spec import Cost, Vis
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
    report = CostReport(4, 0, rows, Cost(7, 1000, 100), ["e", "k", "s", "r"], {"e": 2})
    skip = {"node": "act", "module": "model.layers.1", "source": "m.py:3", "reason": "|x| is wide"}
    passes = [
        PassRow("fuse_norm", "One op for many.", True, 3, 40, 20, []),
        PassRow("fuse_act", "Another.", False, 1, 20, 19, [skip]),
        PassRow("fuse_more", "Yet another.", True, 0, 19, 19, []),
    ]
    left_out = {"quad": "it is lossy"}
    return inspect_costs(report, "tiny", {}, passes, left_out, {"lossy": True})


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


def test_rounds_before_and_after(inspection: Inspection) -> None:
    """Five instructions of 8 rounds in a row; one of them opens what two take."""
    assert [(r.rounds, r.online) for r in inspection.schedule] == [(9, 1400), (8, 1000), (7, 1000)]
    assert "each value is opened once | 8 | 1,000 B |" in inspection.to_markdown()
    assert json.loads(inspection.to_json())["schedule"][2]["rounds"] == 7


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
    assert [(row["name"], row["sites"]) for row in data["passes"]] == [
        ("fuse_norm", 3), ("fuse_act", 1), ("fuse_more", 0),
    ]  # fmt: skip
    markdown = inspection.to_markdown()
    assert "| mpc.linear | 2 | 1x4x8 | shared | 1 | 400 B | 0 B | 40.0% |" in markdown
    assert "| fuse_norm | exact | 3 | 40 → 20 |" in markdown
    assert "| fuse_act | lossy | 1 | 20 → 19 |" in markdown
    assert "Ran and found nothing: fuse_more." in markdown
    assert "Did not run: quad (it is lossy)." in markdown
    console = Console(width=120)
    with console.capture() as capture:
        console.print(inspection.render())
    assert "mpc.embedding" in capture.get()
    assert "lossy: does not compute the model's function, by fuse_act" in capture.get()


def test_savings_are_told_where_they_are_known(inspection: Inspection) -> None:
    norm, act, _ = inspection.passes
    saved = replace(norm, without=Cost(9, 2000, 0), with_it=Cost(7, 1000, 0), instructions=(30, 20))
    needed = replace(act, needed="an op that cannot be lowered")
    markdown = replace(inspection, passes=[saved, needed]).to_markdown()
    assert "| fuse_norm | exact | 3 | 40 → 20 | 9 → 7 | 2,000 B → 1,000 B |" in markdown
    assert "| fuse_act | lossy | 1 | 20 → 19 | needed | needed |" in markdown


def test_why_not(inspection: Inspection) -> None:
    assert (
        inspection.why_not("fuse_norm").verdict
        == "changed 3 sites; no other looked like its pattern"
    )
    act = inspection.why_not("fuse_act")
    assert act.verdict == "changed 1 site and skipped 1:"
    assert r"| act | model.layers.1 | m.py:3 | \|x\| is wide |" in act.to_markdown()
    assert json.loads(act.to_json())["skips"][0]["reason"] == "|x| is wide"
    for width in (120, 80, 30, 8):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(act.render())
        assert "|x| is wide" in " ".join(capture.get().split())
    assert "found no site" in inspection.why_not("fuse_more").verdict
    assert inspection.why_not("quad").verdict == "did not run: it is lossy"
    with pytest.raises(
        CompileError, match="'fuse'; there are: fuse_act, fuse_more, fuse_norm, quad"
    ):
        inspection.why_not("fuse")


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
    assert text.endswith("return [%logits, %cache.out]\n")
    assert text == graph_text(tiny("server"))
