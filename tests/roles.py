"""Runs small scripts as the three roles, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import tempfile
import textwrap
import time
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from mergec.runtime.core.spec import ROLES
from mergec.runtime.transport.lines import Lines, take
from tests.services import CONTEXT

ROOT = Path(__file__).resolve().parent.parent

PREAMBLE = """
import sys
import torch
from mergec.runtime.core.errors import PartyError
"""


@dataclass
class Finished:
    """How one role's process ended."""

    code: int | None
    out: str
    err: str


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


class _Descriptor:
    """A descriptor that another process gets a copy of."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> Any:
        return _detached, (DupFd(self._number),)


def _detached(copy: Any) -> int:
    number: int = copy.detach()
    return number


def _play(role: str, script: str, descriptors: list[int], files: list[Path]) -> None:
    for stream, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    channels = take(role, descriptors, 120.0)
    exec(script, {"__name__": "__main__", "role": role, "channels": channels})


class Script:
    """A script as one role, forked from a process that has imported what roles load.

    It knows `role`, and by rank its `channels` to the two other roles.
    """

    def __init__(self, role: str, script: str, lines: Lines) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        given: Any = [_Descriptor(number) for number in lines.of(role)]
        source = PREAMBLE + textwrap.dedent(script)
        self._process = CONTEXT.Process(
            target=_play, args=(role, source, given, self._files), daemon=True
        )
        self._process.start()

    def wait_for(self, line: str, timeout: float = 180.0) -> None:
        """Wait until it has printed this line."""
        deadline = time.monotonic() + timeout
        while line not in self._files[0].read_text().splitlines():
            assert self._process.exitcode is None and time.monotonic() < deadline, self.finish()
            time.sleep(0.02)

    def kill(self) -> None:
        self._process.kill()

    def finish(self, timeout: float = 180.0) -> Finished:
        """Wait for its end; a script that hangs is killed and has no code."""
        self._process.join(timeout)
        code = self._process.exitcode
        self._process.kill()
        return Finished(code, *(file.read_text() for file in self._files))


def finish(process: subprocess.Popen[str], timeout: float = 180.0) -> Finished:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hangs\n{out}\n{err}") from None
    return Finished(process.returncode, out, err)


def run_roles(script: str, timeout: float = 180.0) -> dict[str, Finished]:
    """Run the script as each role, all connected; a failure shows the output of all."""
    with Lines() as lines:
        scripts = {role: Script(role, script, lines) for role in ROLES}
    return {role: running.finish(timeout) for role, running in scripts.items()}


def outputs(script: str, timeout: float = 180.0) -> dict[str, list[str]]:
    """Lines that each role printed; all roles must succeed."""
    finished = run_roles(script, timeout=timeout)
    failures = {r: (f.code, f.out, f.err) for r, f in finished.items() if f.code != 0}
    assert not failures, failures
    return {role: f.out.splitlines() for role, f in finished.items()}
