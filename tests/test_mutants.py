"""The run that puts single faults into the code: its table, and a change that the tests notice."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.roles import ROOT

SCRIPT = ROOT / "benchmarks" / "mutants.py"
FOLDERS = ("runtime/protocols", "runtime/correlations")
RANKS = "runtime/protocols/ranks.py"


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, in the repository's root."""
    pytest.importorskip("cosmic_ray")
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    return module


def written(name: str) -> dict[str, ast.expr]:
    """A dictionary of the script, as it is written there: cosmic-ray may not be installed."""
    for statement in ast.parse(SCRIPT.read_text()).body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=found)], value=ast.Dict(keys=keys, values=values))
                | ast.AnnAssign(target=ast.Name(id=found), value=ast.Dict(keys=keys, values=values))
            ) if found == name:
                return {
                    ast.literal_eval(key): value
                    for key, value in zip(keys, values, strict=True)
                    if key is not None
                }
    raise LookupError(name)


def has_code(file: Path) -> bool:
    """Whether there is anything beside a docstring."""
    return any(not isinstance(part, ast.Expr) for part in ast.parse(file.read_text()).body)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_with_code_has_tests(folder: str) -> None:
    modules = {
        str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("*.py") if has_code(file)
    }
    assert f"{folder}/__init__.py" not in modules
    assert modules
    assert modules - set(written("SUITES")) == set()


def test_the_tests_of_modules_exist(mutants: Any) -> None:
    for module, tests in mutants.SUITES.items():
        assert Path(module).is_file()
        files = re.findall(r"tests/\S+?\.py", tests)
        assert files
        assert all(Path(file).is_file() for file in files), module


def test_changes_that_nothing_can_notice_are_of_lines_that_there_are() -> None:
    for module, changes in written("EQUIVALENT").items():
        text = " ".join((ROOT / module).read_text().split())
        assert isinstance(changes, ast.Dict)
        for change in changes.keys:
            assert change is not None
            old, new = ast.literal_eval(change)
            assert " ".join(old.split()) in text, old
            assert old != new


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
    tried = mutants.known(file, specs)
    assert list(tried.values()) == [found[:2], *([each] for each in found[2:5])]


def test_the_page_counts_what_changes_anything(
    mutants: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutants, "EQUIVALENT", {RANKS: {("a", "c"): "it is the same"}})
    found = [
        outcome(mutants, "one", "killed"),
        outcome(mutants, "two", "out of time"),
        outcome(mutants, "three", "survived"),
        outcome(mutants, "four", "survived", new="c"),
        outcome(mutants, "five", "survived"),
        outcome(mutants, "five", "survived"),
        outcome(mutants, "five", "killed"),
    ]
    tried: dict[Any, list[Any]] = {}
    for each in found:
        tried.setdefault(each.key, []).append(each)
    text = mutants.page(tried, 9, argparse.Namespace(seed=1, count=5, output=None))
    assert (
        "Seed 1, 5 of 9 places. Of the 4 faults that\nchange anything, the tests noticed 2 on the "
        "first try: 50.0%. With the\ntests that were added since, they notice 3: 75.0%." in text
    )
    assert f"| {RANKS} | 5 | 2 | 1 | 1 | 1 |" in text
    assert "| --- | ---: | ---: |\n| 1 | 4 | 2 (50.0%) |\n\n" in text
    assert f"Unnoticed:\n\n* `{RANKS}:7`: `a` becomes `b`\n" in text
    assert f"Change nothing:\n\n* `{RANKS}:7`: `a` becomes `c`: it is the same\n" in text


def test_a_page_keeps_the_samples_of_other_seeds(mutants: Any) -> None:
    text = ""
    for seed, results in ((12, ["killed"]), (3, ["survived", "killed"]), (12, ["survived"])):
        found = [outcome(mutants, name, name) for name in results]
        tried = {each.key: [each] for each in found}
        text = mutants.page(tried, 9, argparse.Namespace(seed=seed, count=5, output=None), text)
    table = "| --- | ---: | ---: |\n| 3 | 2 | 1 (50.0%) |\n| 12 | 1 | 0 (0.0%) |\n\n| module |"
    assert table in text
    assert text.count("| 12 |") == 1


@pytest.mark.parametrize(
    ("body", "result"),
    [("pass", "survived"), ("assert False", "killed"), ("Event().wait()", "out of time")],
)
def test_what_became_of_a_change(
    mutants: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    body: str,
    result: str,
) -> None:
    """Tests that wait for ever fail as well, but not because they noticed anything."""
    file = tmp_path / "test_it.py"
    file.write_text(f"from threading import Event\n\n\ndef test_it() -> None:\n    {body}\n")
    monkeypatch.setattr(mutants, "SUITES", {RANKS: str(file)})
    options = ["-o", "faulthandler_timeout=1"] if result == "out of time" else []
    monkeypatch.setattr(mutants, "_OPTIONS", [*mutants._OPTIONS, *options])
    monkeypatch.setattr(mutants, "_WAITED", "Timeout (0:00:01)!")
    # A fork of a process whose output is captured would write into the same file.
    with capfd.disabled():
        assert mutants.run_tests(RANKS, 500)[0] == result


def test_time_in_which_nothing_ran_does_not_count(
    mutants: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clock of which an hour goes by at each look, as if the machine had slept in between."""
    file = tmp_path / "test_it.py"
    file.write_text("def test_it() -> None:\n    pass\n")
    monkeypatch.setattr(mutants, "SUITES", {RANKS: str(file)})
    hours = itertools.count(step=3600)
    monkeypatch.setattr(mutants.time, "monotonic", lambda: next(hours))
    assert mutants.run_tests(RANKS, 5000)[0] == "survived"


@pytest.mark.slow
def test_a_change_is_made_in_a_copy_and_noticed() -> None:
    file = ROOT / RANKS
    before = file.read_bytes()
    command = [sys.executable, str(SCRIPT), "--only", "ranks", "--count", "2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{RANKS} | 2 |" in said
    assert file.read_bytes() == before
