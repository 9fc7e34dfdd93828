"""Starts small scripts as the three roles, in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PREAMBLE = """
import sys
import torch
torch.set_num_threads(1)
from runtime.errors import PartyError
from runtime.transport.communicator import CountingCommunicator
from runtime.transport.control import Control, Opcode
from runtime.transport.gloo_stream import dealer_receiver, dealer_sender
from runtime.transport.hello import Hello
from runtime.transport.link import Link
role, rendezvous = sys.argv[1:]
HASH = "ab" * 32
def join(**options):
    options = {"join_timeout": 20.0, "timeout": 20.0, **options}
    return CountingCommunicator.join(role, rendezvous, **options)
"""


@dataclass
class Finished:
    """How one role's process ended."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def start(role: str, script: str, rendezvous: str) -> subprocess.Popen[str]:
    code = PREAMBLE + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code, role, rendezvous],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60.0) -> Finished:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hangs\n{out}\n{err}") from None
    return Finished(process.returncode, out, err)


def run_roles(
    script: str, roles: tuple[str, ...] = ("client", "server", "dealer"), timeout: float = 60.0
) -> dict[str, Finished]:
    """Run the script as each role; a failure shows the output of all."""
    rendezvous = f"tcp://127.0.0.1:{free_port()}"
    processes = {role: start(role, script, rendezvous) for role in roles}
    try:
        return {role: finish(process, timeout) for role, process in processes.items()}
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()


def outputs(script: str, timeout: float = 60.0) -> dict[str, list[str]]:
    """Lines that each role printed; all must end well."""
    finished = run_roles(script, timeout=timeout)
    failures = {r: (f.code, f.out, f.err) for r, f in finished.items() if f.code != 0}
    assert not failures, failures
    return {role: f.out.splitlines() for role, f in finished.items()}
