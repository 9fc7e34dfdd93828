"""Every example runs unchanged, here or in another test that names it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.passes.examples import check_example
from tests.passes.examples import run as run_pass

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=EXAMPLES.parent,
        env={"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_own_pass() -> None:
    first, second = run("own_pass.py").splitlines()
    assert "lossy" not in first
    assert "lossy" in second
    before, after = (
        int(re.findall(r"([\d,]+) B", li)[0].replace(",", "")) for li in (first, second)
    )
    assert after < before
    assert len((EXAMPLES / "own_pass.py").read_text().splitlines()) < 65


def test_own_pass_does_what_it_says() -> None:
    spec = importlib.util.spec_from_file_location("own_pass", EXAMPLES / "own_pass.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check_example(module.ReluForGelu)
    known = (
        "%x = input : shared 1xnewx8\n%w = constant : server 8\n"
        "%1 = mpc.gelu(%w)\n%2 = aten.add.Tensor(%x, %1)\n"
    )
    skipped = run_pass(module.ReluForGelu, known)
    assert (skipped.sites, skipped.text) == (0, skipped.given)
    ((_, reason),) = skipped.skips
    assert "one party knows the operand" in reason


@pytest.mark.slow
def test_own_decoder() -> None:
    *graph, private, plain = run("own_decoder.py").splitlines()
    assert any("mpc.embedding" in line for line in graph)
    assert private.removeprefix("private: ") == plain.removeprefix("in clear:")
    assert len(re.findall(r"\d+", private)) == 4


@pytest.mark.slow
def test_ask_smollm2() -> None:
    said = run("ask_smollm2.py", "What", "is", "the", "capital", "of", "France?")
    assert "Paris" in said


@pytest.mark.slow
def test_inspect_graph(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    said = run("inspect_graph.py", str(page))
    assert "%model.layers.1.mlp" in said
    assert "  + %model.layers.N.mlp" in said
    assert "fuse_layer_norm found no site" in said
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_two_families() -> None:
    said = run("every_family.py", "gpt2", "qwen3")
    assert "gpt2" in said
    assert "qwen3" in said


@pytest.mark.slow
def test_every_family() -> None:
    from tests.families import FAMILIES

    said = run("every_family.py", *FAMILIES)
    assert [line.split()[1] for line in said.splitlines() if line.startswith("│")] == list(FAMILIES)


@pytest.mark.parametrize(
    "name",
    [
        str(file.relative_to(EXAMPLES))
        for kind in ("*.py", "*.ipynb")
        for file in sorted(EXAMPLES.rglob(kind))
        if ".ipynb_checkpoints" not in file.parts
    ],
)
def test_some_test_runs(name: str) -> None:
    """A test names it, or an example that a test runs."""
    file = EXAMPLES / name
    users = [*Path(__file__).parent.rglob("test_*.py")]
    users += [other for other in file.parent.glob("*.py") if other != file]
    told = re.compile(rf"[\"']{re.escape(file.name)}[\"']|^import {file.stem}$", re.MULTILINE)
    assert any(told.search(user.read_text(encoding="utf-8")) for user in users)
