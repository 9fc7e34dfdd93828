"""Who may import whom: read from the source, and tried in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("compiler", "passes")
"""Compiler modules that may know the passes; the others are used by passes."""
KNOWS_PASSES = {"compiler.pipeline", "compiler.history", "compiler.driver", "compiler.cli"}
ABOVE_PASSES = {
    *KNOWS_PASSES,
    "compiler.program",
    "compiler.html",
    "compiler.inspect",
    "compiler.emit",
}


def modules(package: str) -> dict[str, Path]:
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, but not those for types alone."""
    tree = ast.parse(file.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(ast.walk(node))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            base = node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def under(name: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("module", modules("runtime"))
def test_runtime_is_the_bottom(module: str) -> None:
    upward = [i for i in imports(modules("runtime")[module]) if under(i, (*TOP, "tests"))]
    assert not upward, f"{module} imports {upward}: a party installs runtime alone"


@pytest.mark.parametrize("module", sorted(modules("compiler")))
def test_only_the_driver_knows_the_passes(module: str) -> None:
    found = list(imports(modules("compiler")[module]))
    assert not any(under(i, ("tests",)) for i in found)
    if module not in KNOWS_PASSES:
        assert not [i for i in found if under(i, ("passes",))]


@pytest.mark.parametrize("module", sorted(modules("passes")))
def test_passes_use_the_core_alone(module: str) -> None:
    upward = [i for i in imports(modules("passes")[module]) if under(i, {*ABOVE_PASSES, "tests"})]
    assert not upward, f"{module} imports {upward}"


def test_capture_and_emit_are_strangers() -> None:
    compiler = modules("compiler")
    assert not any(under(i, ("compiler.emit",)) for i in imports(compiler["compiler.capture"]))
    assert not any(under(i, ("compiler.capture",)) for i in imports(compiler["compiler.emit"]))


def test_spec_needs_the_standard_library_alone() -> None:
    for name in imports(ROOT / "runtime/spec.py"):
        assert name.split(".")[0] in {*sys.stdlib_module_names, "__future__"}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages, and ours in full, that a fresh process has after `statement`."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_party_loads_no_compiler() -> None:
    loaded = loaded_by("import runtime.party")
    assert not loaded & {"compiler", "passes", "transformers", "onnx", "accelerate"}


def test_the_core_loads_no_passes() -> None:
    assert "passes" not in loaded_by("import compiler.ir")


def test_help_is_quick() -> None:
    loaded = loaded_by("import compiler.cli, compiler")
    assert not loaded & {"torch", "transformers", "numba", "onnx", "networkx"}
