"""Who may import whom: a table of floors that holds every import, and fresh processes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("compiler", "passes", "runtime")

FLOORS = (
    "mergec",
    "compiler.cli",
    "compiler.adaptation",
    "compiler.driver",
    "compiler.program",
    "compiler.answer",
    "compiler.report",
    "compiler.manifest",
    "compiler.pipeline",
    "compiler.selection",
    "compiler.backend",
    "compiler.frontend",
    "passes",
    "compiler.graph",
    "compiler.config",
    "compiler.errors",
    "compiler.text",
    "runtime.cli",
    "runtime.proxy",
    "runtime.roles",
    "runtime.session",
    "runtime.engine",
    "runtime.program",
    "runtime.ops",
    "runtime.protocols",
    "runtime.transport",
    "runtime.crypten",
    "runtime.ranks",
    "runtime.core",
    "runtime.correlations",
    "runtime.kernels",
)
"""From the top to the bottom. A module imports from its own floor and from those below it."""

FORMER_PLACES = {"passes.base", "runtime.op"}
"""Modules that only say where their contents went; nothing imports them."""


def _modules() -> dict[str, Path]:
    found = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    for file in sorted((ROOT / "mergec").glob("*.py")):
        found["mergec" if file.stem == "__init__" else f"mergec.{file.stem}"] = file
    return found


MODULES = _modules()


def _imports(module: str) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, those for types alone included."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name.removeprefix("mergec.") in MODULES else base


def _ours(module: str) -> list[str]:
    return [
        name.removeprefix("mergec.") for name in _imports(module) if name.split(".")[0] == "mergec"
    ]


def _floor(module: str) -> int:
    found = [n for n, floor in enumerate(FLOORS) if f"{module}.".startswith(f"{floor}.")]
    assert found, f"{module} is on no floor: add its folder to FLOORS"
    return found[0]


ANYBODY = {"bare_names", "mergec.bare_names"}
"""What the three folders need to be known by their bare names in a checkout."""


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_imports_point_down(module: str) -> None:
    if module in FORMER_PLACES:
        return
    mine = _floor(module)
    upward = [name for name in _ours(module) if name not in ANYBODY and _floor(name) < mine]
    assert not upward, f"{module} imports {upward} from floors above its own"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports for types alone and those inside of functions count too."""
    graph = nx.DiGraph((module, name) for module in MODULES for name in _ours(module))
    graph.remove_node("mergec")  # the three folders take `bare_names` from it
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert not circles


def test_no_module_is_imported_by_its_bare_name() -> None:
    bare = {
        module: name
        for module in MODULES
        for name in _imports(module)
        if name.split(".")[0] in (*FOLDERS, "tests")
    }
    assert not bare


def test_former_places_are_not_used() -> None:
    assert not [m for m in MODULES if set(_ours(m)) & FORMER_PLACES]


def test_the_architecture_page_shows_the_same_floors() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    shown = re.findall(r"^\| `([\w./]+?)/?` \|", page.partition("## Floors")[2], re.MULTILINE)
    assert tuple(name.replace("/", ".") for name in shown) == FLOORS


def test_capture_and_emit_do_not_know_each_other() -> None:
    assert "compiler.backend.emit" not in _ours("compiler.frontend.capture")
    assert "compiler.frontend.capture" not in _ours("compiler.backend.emit")


def test_spec_needs_the_standard_library_alone() -> None:
    for name in _imports("runtime.core.spec"):
        assert name.split(".")[0] in {*sys.stdlib_module_names, "__future__"}


def _loaded_by(*statements: str) -> list[set[str]]:
    """Every module that a fresh process has after each of the statements, one after another."""
    code = "import sys\n" + "".join(f"{each}\nprint(*sys.modules)\n" for each in statements)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_a_party_loads_no_compiler_and_the_graph_no_passes() -> None:
    party, graph = _loaded_by(
        "import mergec.runtime.roles.party", "import mergec.compiler.graph.ir"
    )
    unwanted = {"mergec.compiler", "mergec.passes", "transformers", "onnx", "accelerate"}
    assert not party & unwanted
    assert "mergec.compiler.graph.ir" in graph
    assert "mergec.passes" not in graph


def test_help_is_quick() -> None:
    (loaded,) = _loaded_by("import mergec, mergec.compiler, mergec.compiler.cli")
    assert not loaded & {"torch", "transformers", "numba", "onnx", "networkx"}


def test_bare_names_in_a_checkout_are_the_same_modules() -> None:
    """`from compiler import compile_decoder` works there, and loads nothing twice."""
    (loaded,) = _loaded_by(
        "import compiler.config, mergec.compiler.config\n"
        "from compiler import compile_decoder\n"
        "from passes.fuse_glu import FuseGlu\n"
        "from runtime.core.spec import Vis\n"
        "import runtime.ops.gelu\n"
        "for name, module in list(sys.modules.items()):\n"
        "    bare = name.removeprefix('mergec.')\n"
        "    assert sys.modules.get(bare, module) is module, name\n"
        "    if name.split('.')[0] in ('compiler', 'passes', 'runtime'):\n"
        "        assert sys.modules['mergec.' + name] is module, name\n"
        "assert compiler.config is mergec.compiler.config\n"
    )
    assert "mergec.compiler.driver" in loaded


def test_former_places_say_where_to_go() -> None:
    moves = (
        ("from mergec.runtime.op import Op", "from mergec import Op", "Op"),
        ("from passes.base import Pass", "from mergec import Pass", "Pass"),
    )
    code = "import warnings\n"
    for old, new, name in moves:
        code += (
            f"{new}\nnew = {name}\n"
            "with warnings.catch_warnings(record=True) as told:\n"
            f"    warnings.simplefilter('always')\n    {old}\n"
            f"assert new is {name}\n"
            "print(*(f'{w.category.__name__}: {w.message}' for w in told))\n"
        )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for line, (_, new, _) in zip(done.stdout.splitlines(), moves, strict=True):
        assert "DeprecationWarning" in line
        assert new.split()[1] in line
