"""What the documentation takes from the code when the site is built, and what it is held to.

Pages that would go stale if they were written by hand are generated: the command line from typer,
the table of ops from their cost formulas. Files of the repository that are pages too
(`MOUNTED`) are added under their own names, and links that leave `docs/` are turned to them. After
the build, every public name must have a docstring and stand in the reference.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mergec

sys.path.append(str(Path(__file__).parent))
from docstrings import as_list

ROOT = Path(__file__).parents[1]
REFERENCE = "reference/api.html"
APP = Path(__file__).with_name("command_line.py")

MOUNTED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
    "benchmarks/results/latest.md": "benchmark.md",
    "benchmarks/results/network.md": "networks.md",
}
"""Files outside of `docs/` that are pages of the site, by their path in the repository."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the mounted ones."""
    generated = {"reference/cli.md": command_line()}
    generated |= {page: (ROOT / path).read_text() for path, page in MOUNTED.items()}
    for page, content in generated.items():
        files.append(File.generated(config, page, content=content))
    for picture in sorted((ROOT / "benchmarks/results").glob("*.png")):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in what is generated, and turn links to files of the repository to their pages."""
    for mark, generate in {"<!-- ops -->": ops, "<!-- errors -->": errors}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, generate())
    here = {page: path for path, page in MOUNTED.items()}.get(
        page.file.src_uri, f"docs/{page.file.src_uri}"
    )

    def turned(match: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        if place in MOUNTED:
            place = f"docs/{MOUNTED[place]}"
        elif not here.startswith("docs/") and place.endswith(".png"):
            place = f"docs/{posixpath.basename(place)}"
        elif here.startswith("docs/"):
            return match[1]
        return posixpath.relpath(place, posixpath.dirname(f"docs/{page.file.src_uri}"))

    return _LINK.sub(turned, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a public name has no docstring, or is missing from the reference."""
    shown = set(re.findall(r'id="([\w.]+)"', (Path(config.site_dir) / REFERENCE).read_text()))
    missing = [f"{name} is not in {REFERENCE}" for name in public_names() if name not in shown]
    bare = [f"{name} has no docstring" for name, item in public_names().items() if not item.__doc__]
    if faults := bare + missing:
        raise PluginError("; ".join(faults))


def public_names() -> dict[str, Any]:
    """`mergec.__all__` and the public methods and properties of its classes, by qualified name."""
    found: dict[str, Any] = {}
    for name in mergec.__all__:
        item = getattr(mergec, name)
        if isinstance(item, str):
            continue
        found[f"mergec.{name}"] = item
        for member, raw in vars(item).items() if inspect.isclass(item) else ():
            wrapped = getattr(raw, "__func__", raw)
            if member[0] != "_" and (inspect.isroutine(wrapped) or isinstance(wrapped, property)):
                found[f"mergec.{name}.{member}"] = wrapped
    return found


def command_line() -> str:
    """Every command and option, as typer describes them."""
    done = subprocess.run(
        [sys.executable, "-m", "typer", str(APP), "utils", "docs", "--name", "mergec"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PluginError(f"the command line cannot be described: {done.stderr}")
    head, *commands = re.split(r"(?m)^(?=## )", done.stdout)
    # typer cuts the commands' descriptions short in its list of them.
    said = [re.findall(r"\A## `mergec (\w+)`\n\n(.+?)\n\n", text, re.DOTALL) for text in commands]
    listed = [f"| [`{name}`](#mergec-{name}) | {text} |" for ((name, text),) in said]
    table = ["| command | |", "| --- | --- |", *listed]
    head = head.partition("**Commands**")[0].replace("# `mergec`", "# Command line", 1)
    return "\n".join([head, *table, "", *commands])


def ops() -> str:
    """Every op of the dialect: its costs as a table, and what its file says of it."""
    from mergec.compiler.report.op_table import op_table
    from mergec.runtime.ops import load_all

    # The parameters stand below, where there is room for them.
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in op_table().splitlines()]
    cells = ([re.sub(r"^`mpc\.(\w+)`$", r"[`\1`](#mpc\1)", row[0]), *row[2:]] for row in rows)
    parts = ["\n".join(f"| {' | '.join(row)} |" for row in cells)]
    for name, op in sorted(load_all().items()):
        parts += [f"## mpc.{name}", f"`mpc.{name}{op.schema}`", as_list(inspect.getdoc(op) or "")]
    return "\n\n".join(parts)


def errors() -> str:
    """The public errors, the most general one first."""
    found = [item for item in public_names().values() if _is_error(item)]
    found.sort(key=lambda kind: (len(kind.__mro__), kind.__name__))
    return "\n\n".join(f"::: mergec.{kind.__name__}" for kind in found)


def _is_error(item: Any) -> bool:
    return inspect.isclass(item) and issubclass(item, Exception)
