"""The run that puts single faults into the code: its table, and a change that the tests notice."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.roles import ROOT

pytest.importorskip("cosmic_ray")
SCRIPT = ROOT / "benchmarks" / "mutants.py"
FOLDERS = ("runtime/protocols", "runtime/correlations")
RANKS = "runtime/protocols/ranks.py"


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, in the repository's root."""
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    return module


def test_every_module_of_the_folders_has_tests_that_exist(mutants: Any) -> None:
    modules = {str(file) for folder in FOLDERS for file in Path(folder).glob("[!_]*.py")}
    assert modules <= set(mutants.SUITES)
    for module, tests in mutants.SUITES.items():
        assert Path(module).is_file()
        files = re.findall(r"tests/\S+?\.py", tests)
        assert files
        assert all(Path(file).is_file() for file in files), module


def test_changes_that_nothing_can_notice_are_of_lines_that_there_are(mutants: Any) -> None:
    for module, changes in mutants.EQUIVALENT.items():
        text = " ".join(Path(module).read_text().split())
        for (old, new), reason in changes.items():
            assert " ".join(old.split()) in text, old
            assert old != new
            assert reason


def outcome(mutants: Any, operator: str, result: str, **changed: Any) -> Any:
    given = {"module": RANKS, "occurrence": 0, "line": 7, "old": "a", "new": "b"}
    digest = mutants.digest(Path(RANKS).read_text())
    return mutants.Outcome(
        operator=operator, result=result, **{"digest": digest, **given, **changed}
    )


def test_a_run_goes_on_with_results_of_the_same_module(mutants: Any, tmp_path: Path) -> None:
    found = [
        outcome(mutants, "noticed", "survived"),
        outcome(mutants, "noticed", "killed"),
        outcome(mutants, "late", "out of time"),
        outcome(mutants, "equal", "survived", new="c"),
        outcome(mutants, "unnoticed", "survived"),
        outcome(mutants, "changed", "killed", digest="of a former text"),
        outcome(mutants, "not asked", "killed"),
    ]
    file = tmp_path / "results"
    assert mutants.known(file, []) == {}
    file.write_text("".join(json.dumps(asdict(each)) + "\n" for each in found))
    names = ["noticed", "late", "equal", "unnoticed", "changed"]
    specs = [mutants.MutationSpec(Path(RANKS), name, 0, (7, 0), (7, 1)) for name in names]
    assert list(mutants.known(file, specs).values()) == found[1:5]


def test_the_page_counts_what_changes_anything(
    mutants: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutants, "EQUIVALENT", {RANKS: {("a", "c"): "it is the same"}})
    found = [
        outcome(mutants, "one", "killed"),
        outcome(mutants, "two", "out of time"),
        outcome(mutants, "three", "survived"),
        outcome(mutants, "four", "survived", new="c"),
    ]
    text = mutants.page(found, 9, argparse.Namespace(seed=1, count=4, output=None))
    assert (
        "Seed 1, 4 of 9 places. The tests noticed 2 of the\n3 faults that change anything: 66.7%"
        in text
    )
    assert f"| {RANKS} | 4 | 1 | 1 | 1 | 1 |" in text
    assert f"Unnoticed:\n\n* `{RANKS}:7`: `a` becomes `b`\n" in text
    assert f"Change nothing:\n\n* `{RANKS}:7`: `a` becomes `c`: it is the same\n" in text


@pytest.mark.slow
def test_a_change_is_made_in_a_copy_and_noticed() -> None:
    file = ROOT / RANKS
    before = file.read_bytes()
    command = [sys.executable, str(SCRIPT), "--only", "ranks", "--count", "2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{RANKS} | 2 |" in said
    assert file.read_bytes() == before
