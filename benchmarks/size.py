"""Lines by floor, as a Markdown table; with a commit, what changed since.

Usage: python benchmarks/size.py [COMMIT]

Code is what is left without blank lines, comments and docstrings. Files that git does not track do
not count.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.test_layers import FLOORS, FOLDERS

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("tests", "benchmarks", "examples", "docs")
NOT_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


@dataclass
class Size:
    """How much a floor or a folder holds."""

    files: int = 0
    lines: int = 0
    code: int = 0


def measure(commit: str | None = None) -> dict[str, Size]:
    """Sizes by floor, then by other folder; of a commit, or of the tracked files as they are."""
    found = {name: Size() for name in (*FLOORS, *FOLDERS, *OTHERS)}
    for path, text in _texts(commit):
        size = found.get(_place(path))
        if size is not None:
            size.files += 1
            size.lines += text.count("\n")
            size.code += _code(text) if path.endswith(".py") else 0
    return {name: size for name, size in found.items() if size.files}


def table(now: dict[str, Size], before: dict[str, Size] | None = None) -> str:
    """A row for each floor, and the sum of the floors; with `before`, the change of each number."""
    rows = ["| | files | lines | code |", "| --- | ---: | ---: | ---: |"]
    names = dict.fromkeys([*now, *(before or {})])
    inside = [name for name in names if name not in OTHERS]
    sums = {"all floors": inside}
    for name, parts in {
        **{n: [n] for n in inside},
        **sums,
        **{n: [n] for n in names if n in OTHERS},
    }.items():
        cells = [
            _cell(
                sum(getattr(now.get(part, Size()), figure) for part in parts),
                before and sum(getattr(before.get(part, Size()), figure) for part in parts),
            )
            for figure in ("files", "lines", "code")
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(now: int, before: int | None) -> str:
    change = "" if before is None or now == before else f" ({now - before:+,})"
    return f"{now:,}{change}"


def _texts(commit: str | None) -> Iterator[tuple[str, str]]:
    """Path and text of each tracked file; links and binary files are left out."""
    if commit is None:
        for name in _git("ls-files", "-z").decode().rstrip("\0").split("\0"):
            file = ROOT / name
            if file.is_file() and not file.is_symlink():
                yield from _decoded(name, file.read_bytes())
        return
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit))) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None:
                yield from _decoded(member.name, content.read())


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"error: git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def _decoded(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    if b"\0" not in content:
        yield name, content.decode()


def _place(path: str) -> str:
    """The floor of a file, else its folder at the top."""
    dotted = path.removesuffix(".py").replace("/", ".") + "."
    floors = (floor for floor in FLOORS if dotted.startswith(f"{floor}."))
    return next(floors, path.partition("/")[0])


def _code(text: str) -> int:
    """Lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    commit = next(iter(sys.argv[1:]), None)
    print(table(measure(), measure(commit) if commit else None))


if __name__ == "__main__":
    main()
