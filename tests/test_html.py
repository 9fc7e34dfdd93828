"""The inspection page: its layout, its parts, and its behaviour in a browser, if there is one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.report.layout import layered
from mergec.runtime.core.errors import PromptError
from tests.browser import chromium
from tests.families import random_decoder

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_decoder(random_decoder("llama").float(), config=CompileConfig(max_length=64))


@pytest.fixture(scope="module")
def page(program: Program) -> str:
    return program.to_html(1, 8)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30), st.data())
def test_layout(count: int, data: st.DataObject) -> None:
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
    edges = sorted({(a, b) for a, b in data.draw(st.lists(pairs, max_size=60)) if a < b})
    layout = layered(count, edges, 100.0, 50.0)
    assert len(set(layout.places)) == count, "no two in one place"
    for (a, b), path in zip(edges, layout.paths, strict=True):
        assert all(0 <= x <= layout.width for x, _ in path)
        assert (path[0], path[-1]) == (layout.places[a], layout.places[b])
        heights = [y for _, y in path]
        assert heights == sorted(set(heights)), "edges lead down"
    rows: dict[float, list[float]] = {}
    for x, y in layout.places:
        assert 0 <= x <= layout.width
        assert 0 <= y <= layout.height
        rows.setdefault(y, []).append(x)
    for row in rows.values():
        row.sort()
        assert all(b - a > 99.0 for a, b in pairwise(row))


def test_the_page_needs_nothing_else(page: str) -> None:
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", page)
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}


def test_the_page_holds_tables_and_changes(program: Program, page: str) -> None:
    inspection = program.inspect(1, 8)
    for row in (*inspection.by_op, *inspection.by_layer):
        assert f'<td class="name">{row.key}</td>' in page
    for entry in inspection.passes:
        assert (f'id="pass-{entry.name}"' in page) == bool(entry.sites)
    assert "<ins>%model.layers.N.mlp" in page
    assert "<del>%model.layers.N.mlp" in page


def own(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A group's nodes, without the ports to other groups."""
    return [node for node in nodes if node["kind"] != "port"]


def test_a_step_of_a_program_in_phases() -> None:
    """Nodes that only another step runs are drawn, and marked."""
    config = CompileConfig(max_length=64, preset="merge")
    program = compile_decoder(random_decoder("llama").float(), config=config)
    assert [row.step for row in program.inspect().steps] == ["prompt", "decode", "finish"]
    for new, past in ((5, 0), (1, 8), (0, 8)):
        text = program.to_html(new, past)
        assert f"lossy: {', '.join(program.inspect(new, past).lossy)}<" in text
        data = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
        groups = {group["key"]: group["nodes"] for group in data["graphs"][1]["groups"]}
        nodes = [node for group in groups.values() for node in own(group)]
        idle = {node["name"] for node in nodes if "idle" in node}
        assert ("lm_head.linear" in idle) == (new > 0)
        assert ("model.embed_tokens.embedding" in idle) == (past > 0)
        assert (idle >= {node["name"] for node in own(groups[LAYER])}) == (new == 0)
        assert not any("idle" in node and "online" in node for node in nodes)
        assert (
            sum(node.get("online", 0) for node in nodes) == program.inspect(new, past).total.online
        )
    with pytest.raises(PromptError, match="one token after the prompt, not 3"):
        program.to_html(3, 8)


def test_a_loaded_program_shows_one_graph(program: Program, tmp_path: Path) -> None:
    text = Program.load(program.save(tmp_path / "bundles"), roles=("client",)).to_html(1, 8)
    assert "As the parties run it" in text
    assert "As captured" not in text


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    with chromium(tmp_path / "profile") as driver:
        yield driver


def test_in_a_browser(browser: Any, program: Program, page: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    browser.get(file.as_uri())

    def all_of(selector: str) -> list[Any]:
        return browser.find_elements("css selector", selector)

    for side in ("before", "after"):
        assert len(all_of(f'[data-graph={side}] [data-layer="{LAYER}"]')) == 1
    assert not all_of("[data-node]"), "layers are closed at first"
    toggle = f'[data-graph=after] [data-layer="{LAYER}"] rect.hit'
    all_of(toggle)[0].click()
    wanted = {
        item.name
        for item in program.any_role.instructions
        if item.module.startswith(LAYER) and item.target.startswith("mpc.")
    }
    shown = {node.get_attribute("data-node") for node in all_of("[data-graph=after] [data-node]")}
    assert wanted <= shown
    assert all_of('[data-graph=before] [data-node$="mlp.act_fn.silu"]'), "both sides open"

    node = next(n for n in all_of("[data-graph=after] .node:not(.port)"))
    node.click()
    assert node.get_attribute("data-node") in all_of("#detail h3")[0].text
    all_of("#detail .close")[0].click()
    all_of(toggle)[0].click()
    assert not all_of("[data-node]"), "and closed again"

    place = browser.find_element("css selector", "[data-graph=after] svg > g")
    before = place.get_attribute("transform")
    all_of("#in")[0].click()
    assert place.get_attribute("transform") != before, "zooms"
    find = all_of("#find")[0]
    find.send_keys("lm_head", "\ue007")
    assert all_of('[data-graph=after] .node.hit[data-node^="lm_head"]')

    all_of("[data-tab=passes]")[0].click()
    head = all_of("#pass-fuse_glu .head")[0]
    assert not all_of("#pass-fuse_glu ins")[0].is_displayed()
    head.click()
    assert all_of("#pass-fuse_glu ins")[0].is_displayed()
    all_of("[data-tab=cost]")[0].click()
    assert all_of(".costs .track i")[0].size["width"] > 0
    assert not browser.get_log("browser")


def test_the_page_shows_what_each_role_sees(program: Program, page: str) -> None:
    found = program.audit()
    shown = page.partition('<main id="privacy"')[2]
    assert 'data-tab="privacy"' in page
    for seen in found.seen:
        assert f'<td class="name">{seen.op}</td><td>{seen.form}</td>' in shown
    assert "Nothing is sent without a mask but what is revealed to the client." in shown
    assert program.manifest.program_hash in shown
