"""The examples that need neither a model from elsewhere nor much time run as they are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=EXAMPLES.parent,
        env={"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_pass() -> None:
    first, second = run("own_pass.py").splitlines()
    assert "lossy" not in first
    assert "lossy" in second
    before, after = (
        int(re.findall(r"([\d,]+) B", li)[0].replace(",", "")) for li in (first, second)
    )
    assert after < before
    assert len((EXAMPLES / "own_pass.py").read_text().splitlines()) < 60


def test_inspect_graph(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    said = run("inspect_graph.py", str(page))
    assert "%model.layers.1.mlp" in said
    assert "  + %model.layers.N.mlp" in said
    assert "fuse_layer_norm found no site" in said
    assert page.read_text().startswith("<!doctype html>")


def test_two_families() -> None:
    said = run("every_family.py", "gpt2", "qwen3")
    assert "gpt2" in said
    assert "qwen3" in said


@pytest.mark.slow
def test_every_family() -> None:
    from tests.families import FAMILIES

    said = run("every_family.py")
    assert [line.split()[1] for line in said.splitlines() if line.startswith("│")] == list(FAMILIES)
