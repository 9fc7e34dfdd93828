"""The tutorials run as written, and generated pages are complete."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import mergec
from mergec.compiler.cli import app
from mergec.runtime.ops import load_all

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted(p for p in (DOCS / "tutorials").glob("*.md") if p.stem != "index")
PAGES = [DOCS / "get-started.md", *TUTORIALS]
PORTS = ("29600", "29700", "8000")
"""The ports that the pages name; a test takes free ones."""

BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNER = Path(__file__).with_name("docs_runner.py")


@dataclass(frozen=True)
class Block:
    """A fenced block. A title names the file whose content it is."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*match.groups(default="")) for match in BLOCK.finditer(page.read_text())]


def free_ports(count: int) -> list[str]:
    with_socket = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [str(one.getsockname()[1]) for one in with_socket]
    for one in with_socket:
        one.close()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to work in, with the tiny model of Get started and the commands of the pages."""
    (tiny,) = (block for block in blocks(PAGES[0]) if block.title == "tiny.py")
    (tmp_path / tiny.title).write_text(tiny.text)
    # What a page installs goes to a folder of its own, and nothing is downloaded.
    site = tmp_path / "site"
    site.mkdir()
    install = f'-m pip --quiet "$@" --no-build-isolation --no-deps --no-index --target {site}'
    commands = {"mergec": '-m mergec "$@"', "python": '"$@"', "pip": install}
    (tmp_path / "bin").mkdir()
    for name, arguments in commands.items():
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}\n')
        command.chmod(0o755)
    return tmp_path


LONG = ("add-an-op", "get-started", "inspect", "openai-app", "three-machines", "write-a-pass")
"""Pages that take about half a minute or more."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in LONG else ())
        for page in PAGES
    ],
)
def test_a_page_runs(page: Path, folder: Path) -> None:
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    text = re.sub(r"\b(29600|29700|8000)\b", lambda match: ports[match[1]], page.read_text())
    script = folder / "page.md"
    script.write_text(text)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}:{folder / 'site'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_every_block_says_whether_it_runs() -> None:
    for page in PAGES:
        languages = {block.language for block in blocks(page)}
        assert languages <= {"python", "console", "text", "sh", "toml", "ir"}, page.name
        assert page.read_text().count("\n```") == 2 * len(blocks(page)), (
            f"{page.name}: a bare fence"
        )


def module(name: str) -> ModuleType:
    """A module that is used while the site is built."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_fields_of_a_docstring_become_a_list() -> None:
    text = """One row of a table.

rounds: how many
    there are.
form, kind: in which it is.
        "share": a share.
        "masked": opened
            under a mask.
    See elsewhere.

In all: nothing else.

Args:
    x: a number.
"""
    assert module("docstrings").as_list(text).splitlines() == [
        "One row of a table.",
        "",
        "- **`rounds`**: how many",
        "    there are.",
        "- **`form, kind`**: in which it is.",
        "",
        '    - **`"share"`**: a share.',
        '    - **`"masked"`**: opened',
        "        under a mask.",
        "",
        "    See elsewhere.",
        "",
        "In all: nothing else.",
        "",
        "Args:",
        "    x: a number.",
    ]


def test_the_command_line_is_complete() -> None:
    page = module("hooks").command_line()
    for command in app.registered_commands:
        assert f"| [`{command.name}`](#mergec-{command.name}) |" in page
        assert f"\n## `mergec {command.name}`\n" in page


def test_every_op_is_in_the_table() -> None:
    page = module("hooks").ops()
    for name, op in load_all().items():
        assert f"| [`{name}`](#mpc{name}) |" in page
        assert f"\n## mpc.{name}\n\n`mpc.{name}{op.schema}`\n" in page


def test_public_names_include_methods_of_classes() -> None:
    names = module("hooks").public_names()
    assert {"mergec.compile_decoder", "mergec.Program.inspect", "mergec.Op.cost"} <= set(names)
    assert "mergec.__version__" not in names


def test_examples_in_docstrings_run() -> None:
    """In a process of its own, because one of them registers an op."""
    modules = [
        ".".join(("mergec", *file.relative_to(ROOT).with_suffix("").parts))
        for folder in ("compiler", "passes", "runtime")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if ">>> " in file.read_text(encoding="utf-8")
    ]
    assert {"mergec.compiler.config", "mergec.compiler.graph.rewriting"} <= set(modules)
    code = (
        "import doctest, importlib\n"
        f"for name in {modules}:\n"
        "    result = doctest.testmod(importlib.import_module(name))\n"
        "    assert not result.failed, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_class_and_function_shows_an_example() -> None:
    """All but errors: of those the message says what there is to say."""
    silent = []
    for name in mergec.__all__:
        value = getattr(mergec, name)
        error = isinstance(value, type) and issubclass(value, mergec.MergecError)
        if callable(value) and not error and ">>> " not in value.__doc__:
            silent.append(name)
    assert not silent
