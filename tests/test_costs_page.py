"""The table of predicted costs: its rows are those of `Program.inspect`, its place is marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergec import compile_decoder
from tests.roles import ROOT


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import costs

    return costs


@pytest.fixture
def rows(costs: Any) -> list[Any]:
    return [
        costs.Row(
            "m", network, new, past, 100 + new + 10 * i, 90, 5_000_000, 250_000_000, 10**9, 1.5, 0.5
        )
        for i, network in enumerate(costs.CHOSEN)
        for new, past in costs.STEPS
    ]


def test_a_step_s_networks_stand_beside_each_other(costs: Any, rows: list[Any]) -> None:
    lines = costs.short(rows).splitlines()
    assert len(lines) == 2 + len(costs.STEPS)
    assert lines[2] == "| m | prompt of 16 | 116 / 126 / 136 | 5.0 | 250 | 1,000 | 1.5 |  |"
    assert lines[-1].startswith("| m | decode after 128 | 101 / 111 / 121 |")


def test_figures_within_a_hundredth_are_one(costs: Any) -> None:
    assert costs.joined([1000, 1000, 1010], "{:,}".format) == "1,000"
    assert costs.joined([1000, 1000, 1011], "{:,}".format) == "1,000 / 1,000 / 1,011"
    assert costs.joined([0.0, 0.0, 0.0], "{:.1f}".format) == "0.0"


def test_the_page_has_a_line_for_each_step_and_network(costs: Any, rows: list[Any]) -> None:
    text = costs.page(rows)
    assert text.count("| prompt of 500 |") == text.count("| decode after 128 |") == 3
    assert "| prompt of 64 | wan | 184 | 90 | 5.0 | 250 | 1,000 | 1.50 | 0.50 |" in text


def test_rows_are_those_of_the_inspection(costs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench

    monkeypatch.setattr(costs, "STEPS", ((4, 0), (1, 8)))
    model, _ = bench._random("gpt2", vocab_size=300, n_embd=64, n_layer=1, n_head=4)
    program = compile_decoder(model)
    prompt, decode = costs.predict("m", "loopback", program)
    found = program.inspect(1, 8)
    assert (decode.rounds, decode.online) == (found.total.rounds, found.total.online)
    assert decode.to_client + decode.to_server == found.total.offline
    assert prompt.online > decode.online
    assert (prompt.step, decode.step) == ("prompt of 4", "decode after 8")


def test_text_goes_between_its_marks_alone(costs: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    costs.replace_between(page, "x", "new\nlines")
    costs.replace_between(page, "x", "newer")
    assert page.read_text() == "a\n<!-- x: begin -->\nnewer\n<!-- x: end -->\nb\n"
    with pytest.raises(ValueError, match="lacks <!-- y: begin -->"):
        costs.replace_between(page, "y", "new")


@pytest.mark.parametrize("mark", ["costs", "peers"])
def test_the_readme_has_places_for_the_tables(mark: str) -> None:
    text = (ROOT / "README.md").read_text()
    begin, end = (text.index(f"<!-- {mark}: {place} -->\n") for place in ("begin", "end"))
    assert text[begin:end].count("\n| ") > 2
