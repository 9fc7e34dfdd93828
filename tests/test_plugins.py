"""Passes that other packages offer by entry points."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.pipeline import rewrite
from mergec.compiler.selection import left_out, select
from mergec.passes import available
from tests.families import captured

SOURCE = '''
from mergec.compiler.graph.rewriting import Pass

class SwapFactors(Pass):
    """Changes nothing."""
    stage = "canonicalize"
    exact = {exact}

    def run(self, graph_module):
        return 0

class FuseGlu(Pass):
    """Has a name that is taken."""
    stage = "fuse"
'''


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package that offers one thing."""

    def install(value: str, exact: bool = True) -> None:
        module = f"offered_{uuid.uuid4().hex}"
        (tmp_path / f"{module}.py").write_text(SOURCE.format(exact=exact))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mergec.passes]\nmine = {module}:{value}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_an_exact_pass_runs_by_default(offer) -> None:
    offer("SwapFactors")
    assert "swap_factors" in available()
    reports = rewrite(captured("gpt2"), CompileConfig())
    assert "swap_factors" in [report.name for report in reports]
    kept = select(CompileConfig(disable=("swap_factors",)))
    assert "swap_factors" not in [kind.name() for kind in kept]


def test_a_lossy_pass_runs_on_request(offer) -> None:
    offer("SwapFactors", exact=False)
    assert "it is lossy" in left_out(CompileConfig())["swap_factors"]
    asked = select(CompileConfig(enable=("swap_factors",)))
    assert "swap_factors" in [kind.name() for kind in asked]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("FuseGlu", "has the name of another pass, 'fuse_glu'"),
        ("Missing", "cannot be loaded: .*Missing"),
        ("SwapFactors.run", "is not a subclass of mergec.Pass; repair"),
    ],
)
def test_what_cannot_be_used_is_named(offer, value: str, words: str) -> None:
    offer(value)
    with pytest.raises(CompileError, match=words):
        available()
