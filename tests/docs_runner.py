"""Run the blocks of a page in order: `python docs_runner.py PAGE`.

A `python` block runs in one namespace for the whole page; with a title, it is written to the file
of that name instead. Lines of a `console` block that begin with `$` run in a shell; a command that
ends with `&` runs in the background until the end of the page, and the next one waits until it
listens. A `text` block is the expected output of the block before it; `…` stands for any text.
Blocks of other languages are shown and not run.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATIENCE = 120.0


class Page:
    """One page as it runs."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.background: list[subprocess.Popen[bytes]] = []

    def run(self, path: Path) -> None:
        said, where = None, ""
        try:
            for match in BLOCK.finditer(path.read_text()):
                language, title, text = match.groups(default="")
                if language == "text":
                    if said is not None:
                        check(text, said, where)
                    continue
                where = f"{path.name}: the block `{text.strip().splitlines()[0]}`"
                if title and language in ("python", "toml"):
                    Path(title).write_text(text)
                    said = None
                elif language == "python":
                    said = self.python(text, where)
                elif language == "console":
                    said = self.console(text, where)
                else:
                    said = None
        finally:
            for process in self.background:
                process.terminate()
            for process in self.background:
                process.wait(PATIENCE)

    def python(self, text: str, where: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, where, "exec"), self.namespace)
        return printed.getvalue()

    def console(self, text: str, where: str) -> str:
        said = []
        for command in re.findall(r"^\$ ((?:.*\\\n)*.*)$", text, re.MULTILINE):
            if command.endswith("&"):
                self.start(command.removesuffix("&"), where)
                continue
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{where}: {command} failed\n{done.stdout}{done.stderr}")
            said.append(done.stdout)
        return "".join(said)

    def start(self, command: str, where: str) -> None:
        log = Path(f"background-{len(self.background)}.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], stdout=output, stderr=output
            )
        self.background.append(process)
        deadline = time.monotonic() + PATIENCE
        while '"listening"' not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{where}: {command} does not listen\n{log.read_text()}")
            time.sleep(0.05)


def check(wanted: str, said: str, where: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not doctest.OutputChecker().check_output(wanted.replace("…", "..."), said, options):
        raise SystemExit(f"after {where}\nexpected:\n{wanted}\nprinted:\n{said}")


if __name__ == "__main__":
    Page().run(Path(sys.argv[1]))
