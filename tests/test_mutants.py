"""The run that puts single faults into the code: its table, and a change that the tests notice."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.roles import ROOT

pytest.importorskip("cosmic_ray")
SCRIPT = ROOT / "benchmarks" / "mutants.py"
FOLDERS = ("runtime/protocols", "runtime/correlations")


def test_every_module_of_the_folders_has_tests_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    mutants = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", mutants)
    spec.loader.exec_module(mutants)
    monkeypatch.chdir(ROOT)
    modules = {str(file) for folder in FOLDERS for file in Path(folder).glob("[!_]*.py")}
    assert modules <= set(mutants.SUITES)
    for module, tests in mutants.SUITES.items():
        assert Path(module).is_file()
        files = re.findall(r"tests/\S+?\.py", tests)
        assert files
        assert all(Path(file).is_file() for file in files), module


@pytest.mark.slow
def test_a_change_is_made_in_a_copy_and_noticed() -> None:
    file = ROOT / "runtime/protocols/ranks.py"
    before = file.read_bytes()
    command = [sys.executable, str(SCRIPT), "--only", "ranks", "--count", "2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "runtime/protocols/ranks.py | 2 |" in said
    assert file.read_bytes() == before
