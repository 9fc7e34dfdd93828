"""Runs small scripts as the three roles, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from mergec.runtime.core.spec import ROLES
from mergec.runtime.transport.lines import Lines

ROOT = Path(__file__).resolve().parent.parent

PREAMBLE = """
import sys
import torch
torch.set_num_threads(1)
from mergec.runtime.core.errors import PartyError
from mergec.runtime.transport.lines import take
role, *descriptors = sys.argv[1:]
channels = take(role, list(map(int, descriptors)), 120.0)
"""
"""Defines `role`, and `channels` to the two other roles by rank."""


@dataclass
class Finished:
    """How one role's process ended."""

    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def start(role: str, script: str, lines: Lines) -> subprocess.Popen[str]:
    descriptors = lines.of(role)
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), role, *map(str, descriptors)],
        cwd=ROOT,
        env=environment(),
        pass_fds=descriptors,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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
        processes = {role: start(role, script, lines) for role in ROLES}
    try:
        return {role: finish(process, timeout) for role, process in processes.items()}
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()


def outputs(script: str, timeout: float = 180.0) -> dict[str, list[str]]:
    """Lines that each role printed; all roles must succeed."""
    finished = run_roles(script, timeout=timeout)
    failures = {r: (f.code, f.out, f.err) for r, f in finished.items() if f.code != 0}
    assert not failures, failures
    return {role: f.out.splitlines() for role, f in finished.items()}
