"""A short form of `make adaptation`, on sentences of its own."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.roles import ROOT, environment

WORDS = (
    ("old", "small", "green", "happy"),
    ("dog", "king", "child", "farmer"),
    ("saw", "found", "carried", "painted"),
    ("house", "apple", "river", "stone"),
)
T5_RUNS = ("MM", "MERGE, matched, resent")
RUNS = ("MERGE, as described", "ER, matched, resent, teacher's answers")


def write_wordnet(folder: Path) -> None:
    """Files as WordNet's, with a licence at their tops and an example sentence in each gloss."""
    for name in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{name}").write_text("  1 This is a licence.  \n")
    lines = [
        f'{number:08} 03 n 01 word 0 000 | a meaning; "The {a} {b} {c} the {d}"; "too short"  \n'
        for number, (a, b, c, d) in enumerate(itertools.product(*WORDS))
    ]
    with (folder / "data.noun").open("a") as file:
        file.writelines(lines)


@pytest.mark.slow
def test_every_part_of_the_page_is_measured(tmp_path: Path) -> None:
    wordnet = tmp_path / "wordnet"
    wordnet.mkdir()
    write_wordnet(wordnet)
    target = tmp_path / "page.md"
    target.write_text(
        "By hand.\n\n<!-- adaptation: begin -->old<!-- adaptation: end -->\n\nMore.\n"
    )
    command = [sys.executable, "benchmarks/adaptation.py", "--wordnet", str(wordnet)]
    command += ["--work", str(tmp_path / "work"), "--output", str(target)]
    command += ["--layers", "1", "--width", "32", "--teacher-steps", "100", "--steps", "4"]
    command += ["--samples", "4", "--only", *RUNS]
    given = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    text = target.read_text()
    assert text.startswith("By hand.\n")
    assert text.endswith("\nMore.\n")
    assert "old<!--" not in text
    assert "256 different ones of 4 to 10 words" in text
    assert "231 are trained on" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    by_name: dict[str, list[list[str]]] = {}
    for name, *cells in rows:
        by_name.setdefault(name, []).append(cells)
    # Perplexity of words that the prompt and a few others leave open: far from 23, that of chance.
    assert float(by_name["teacher"][0][0]) < 12
    assert by_name["teacher"][0][1] == "100 %"
    for name in RUNS:
        quality, curve, cost, answers = by_name[name]
        assert len(quality) == 9
        assert len(curve) == 5
        assert int(cost[1]) < int(by_name["exact (the teacher)"][0][1])
        assert cost[3] == "4 of 4"
        assert len(answers) == 4

    # All runs are done, so the same command only writes the page again.
    again = subprocess.run(
        command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=900
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "step" not in again.stdout
    assert target.read_text() == text


@pytest.mark.slow
def test_a_t5_is_measured_beside_it(tmp_path: Path) -> None:
    """Between marks of its own; what stands between the others stays."""
    wordnet, target = tmp_path / "wordnet", tmp_path / "page.md"
    wordnet.mkdir()
    write_wordnet(wordnet)
    others = "<!-- adaptation: begin -->old<!-- adaptation: end -->"
    target.write_text(
        f"{others}\n\n<!-- adaptation of t5: begin -->old<!-- adaptation of t5: end -->\n"
    )
    command = [sys.executable, "benchmarks/adaptation.py", "--wordnet", str(wordnet)]
    command += ["--family", "t5", "--work", str(tmp_path / "work"), "--output", str(target)]
    command += ["--layers", "1", "--width", "32", "--teacher-steps", "100", "--steps", "4"]
    command += ["--samples", "4"]
    given = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--only", *T5_RUNS],
        cwd=ROOT, env=given, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    text = target.read_text()
    assert text.startswith(others)
    assert "a T5 of 1 layers of width 32" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    by_name: dict[str, list[list[str]]] = {}
    for name, *cells in rows:
        by_name.setdefault(name, []).append(cells)
    assert by_name["teacher"][0][1] == "100 %"
    assert len(by_name["MM, untrained"][0]) == 9
    exact = int(by_name["exact (the teacher)"][0][1])
    for name in T5_RUNS:
        *_, cost = by_name[name]
        assert int(cost[1]) < exact
        assert cost[3] == "4 of 4"
    wrong = [*command, "--only", "THE-X"]
    done = subprocess.run(wrong, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "no run of t5 is 'THE-X'" in done.stderr


@pytest.mark.slow
def test_a_folder_without_wordnet_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/adaptation.py", "--wordnet", str(tmp_path)]
    given = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "data.noun is missing: apt-get install wordnet-base, or --wordnet DIR" in done.stderr
