"""Starts the ranks of a party on this machine, watches them, and names the one that fails."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, NoReturn

import torch

from mergec.runtime.core.errors import DEBUG, RankError
from mergec.runtime.core.memory import WordsFile
from mergec.runtime.ranks.group import Group
from mergec.runtime.ranks.link import MOST, ORDER, Link, LostError, Order, device_of
from mergec.runtime.ranks.process import LOST, Job

PROCESS = "mergec.runtime.ranks.process"

_GRACE = 2.0
"""Seconds that a rank has to end and to say why, once it does not answer any more."""


def start(
    role: str,
    count: int,
    device: str = "cpu",
    threads: int | None = None,
    timeout: float = 600.0,
    file: WordsFile | None = None,
) -> Party:
    """Start all ranks of a party but this process, which is rank 0, and meet them.

    threads: of each rank; by default an equal part of the cores. timeout: seconds that one answer
    of a rank may take. file: of weights, which every rank maps. Raises RankError if one does not
    start, and MergecError if there are fewer GPUs than ranks.
    """
    devices = [device_of(device, rank) for rank in range(count)]
    party = Party(role, threads or max(1, (os.cpu_count() or count) // count), timeout, file)
    try:
        party.begin(devices)
    except BaseException:
        party.close()
        raise
    return party


@contextmanager
def started(
    role: str,
    count: int,
    device: str = "cpu",
    threads: int | None = None,
    timeout: float = 600.0,
    file: WordsFile | None = None,
) -> Iterator[Group | None]:
    """The ranks of a party while the block runs; None if there is one. See `start`."""
    if count == 1:
        yield None
        return
    party = start(role, count, device, threads, timeout, file)
    try:
        yield party.group
    finally:
        party.close()


class Party:
    """The ranks of one party: `group` computes with them. Close it at the end of a session."""

    def __init__(
        self, role: str, threads: int, timeout: float, file: WordsFile | None = None
    ) -> None:
        self.role = role
        self._threads, self._timeout, self._file = threads, timeout, file
        self._processes: dict[int, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        self._failed: dict[int, str] = {}
        self._group: Group | None = None

    @property
    def group(self) -> Group:
        if self._group is None:
            raise RankError(f"the ranks of the {self.role} have ended; start again")
        return self._group

    @property
    def pids(self) -> dict[int, int]:
        """The process of each rank but the first."""
        return {rank: process.pid for rank, (process, _) in self._processes.items()}

    def begin(self, devices: list[torch.device]) -> None:
        """Start a process for each rank but the first, and meet them at a file."""
        # A folder of the user's own: nobody else may join the group, or learn where it meets.
        folder = tempfile.mkdtemp(prefix="mergec-ranks-")
        try:
            store = str(Path(folder) / "store")
            for rank in range(1, len(devices)):
                where = str(devices[rank])
                file = None if self._file is None else self._file.descriptor
                self._launch(
                    Job(rank, len(devices), store, where, self._threads, self._timeout, file)
                )
            self._await("ready")
            timeout = timedelta(seconds=self._timeout)
            link = Link(store, 0, len(devices), devices[0], timeout)
            link.intact = self._all_run
            self._await("met")  # until then the others read the file
            self._group = Group(link, self._tell, self._lost, self._file)
        except LostError as error:
            self._lost(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _all_run(self) -> bool:
        return all(process.poll() is None for process, _ in self._processes.values())

    def _launch(self, job: Job) -> None:
        root = str(Path(__file__).absolute().parents[3])
        path = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
            "OMP_NUM_THREADS": str(job.threads),
            "NUMBA_NUM_THREADS": str(job.threads),
        }
        said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        process = subprocess.Popen(
            [sys.executable, "-m", PROCESS],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get(DEBUG) else said,
            bufsize=0,
            # By its name, a rank might find a bundle that has replaced this one.
            pass_fds=() if job.file is None else (job.file,),
        )
        self._processes[job.rank] = process, said
        with suppress(BrokenPipeError):
            if process.stdin is not None:
                process.stdin.write(job.json().encode() + b"\n")

    def _tell(self, order: Order, *numbers: int) -> None:
        """Write an order to every other rank. Raises LostError if one has ended."""
        fields = (order, *numbers)
        data = ORDER.pack(*fields, *[0] * (MOST + 2 - len(fields)))
        for process, _ in self._processes.values():
            try:
                if process.stdin is not None:
                    process.stdin.write(data)
            except BrokenPipeError as error:
                raise LostError("it has ended") from error

    def _await(self, word: str) -> None:
        """Wait until every other rank says this. Raises RankError if one does not in time."""
        deadline = time.monotonic() + self._timeout
        for rank, (process, _) in self._processes.items():
            left = max(0.0, deadline - time.monotonic())
            if process.stdout and not select.select([process.stdout], [], [], left)[0]:
                raise RankError(
                    f"rank {rank} of the {self.role} did not start within {self._timeout:g} s; "
                    "all its ranks were stopped"
                )
            if word not in self._heard(rank):
                self._raise(rank)

    def _heard(self, rank: int) -> dict[str, object]:
        """The next line that a rank says; empty if it has ended."""
        stdout = self._processes[rank][0].stdout
        line = stdout.readline() if stdout is not None else b""
        try:
            said = json.loads(line)
        except ValueError:
            return {}
        if not isinstance(said, dict):
            return {}
        self._failed |= {rank: str(said["failed"])} if "failed" in said else {}
        return said

    def _lost(self, error: LostError) -> NoReturn:
        """Raise RankError for the rank that does not answer any more."""
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            # Ranks that lost another one end as well, and are not the cause.
            for rank in self._processes:
                if self._cause(rank):
                    self._raise(rank)
            time.sleep(0.02)
        running = [str(rank) for rank, (of, _) in self._processes.items() if of.poll() is None]
        which = f"ranks {', '.join(running)}" if len(running) > 1 else f"rank {''.join(running)}"
        raise RankError(
            f"{which} of the {self.role} did not answer ({error}); all its ranks were stopped"
        ) from error

    def _raise(self, rank: int) -> NoReturn:
        with suppress(subprocess.TimeoutExpired):
            self._processes[rank][0].wait(_GRACE)
        cause = self._cause(rank) or "ended without a reason"
        raise RankError(f"rank {rank} of the {self.role} {cause}; all its ranks were stopped")

    def _cause(self, rank: int) -> str:
        """How a rank ended; empty if it runs, or ended because it lost another one."""
        process, said = self._processes[rank]
        code = process.poll()
        if code is None or code == LOST:
            return ""
        if code < 0:
            memory = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-code).name}{memory}"
        if rank not in self._failed:
            self._heard(rank)
        if rank in self._failed:
            return f"failed: {self._failed[rank]}"
        said.seek(0)
        text = said.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"ended with code {code}{f': {lines[-1]}' if lines else ''}"

    def close(self) -> None:
        """End all ranks but this process."""
        self._group = None
        for process, said in self._processes.values():
            with suppress(BrokenPipeError):
                if process.stdin is not None:
                    process.stdin.close()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:  # stopped, or waiting for another rank
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
            said.close()
        self._processes.clear()
