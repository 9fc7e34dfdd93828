"""Servers and dealers as processes, for tests."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from mergec.runtime.roles.client import Connection
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security

START = 120.0
"""Seconds after which something hangs. Tests wait for states; this only bounds the wait."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


Patch = Callable[[], object]
"""Changes modules in a role's process before it starts; a function of a module."""


def _play(arguments: list[str], output: Path, patch: Patch | None) -> None:
    """Run `mergec` in its own process and process group, with its output in a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    os.setpgid(0, 0)
    # Where the tests are a shell's background job, SIGINT is ignored, and would be in here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["mergec", *arguments]
    from mergec.runtime.cli import main

    if patch is not None:
        patch()
    main()


class Process:
    """A `mergec` command, forked from a process that has imported what roles load."""

    def __init__(self, arguments: list[str], output: Path, patch: Patch | None = None) -> None:
        output.touch()
        self._process = CONTEXT.Process(target=_play, args=(arguments, output, patch), daemon=True)
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = START) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, "hangs"
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """Send a signal to the process and to its sessions' processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class Role:
    """A role's process and its log."""

    def __init__(
        self, command: str, bundle: Path, *options: str, patch: Patch | None = None
    ) -> None:
        # Opened for appending, because reading here must not move the position of writes.
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "log"
        listen = ("--port", "0") if command == "proxy" else ("--listen", "127.0.0.1:0")
        self.process = Process([command, str(bundle), *listen, *options], self._file, patch)

    @property
    def output(self) -> str:
        return self._file.read_text()

    @property
    def log(self) -> list[dict[str, Any]]:
        found = []
        for line in self.output.splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def wait_for(self, event: str, count: int = 1, timeout: float = START) -> dict[str, Any]:
        """The `count`th log line of this event; waits for it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None  # looked at first: it may log and then end
            found = [line for line in self.log if line["event"] == event]
            if len(found) >= count:
                return found[count - 1]
            assert not ended, self.output
            time.sleep(0.02)
        raise AssertionError(f"no {event!r}\n{self.output}")

    @property
    def address(self) -> Address:
        return Address.parse(self.wait_for("listening")["address"])

    @property
    def metrics(self) -> Address:
        return Address.parse(self.wait_for("serving metrics")["address"])

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes of the active sessions."""
        return list(psutil.Process(self.process.pid).children())

    def stop(self, number: int = signal.SIGTERM, timeout: float = START) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def end(self) -> None:
        if self.process.poll() is None:
            for worker in self.workers:
                with suppress(psutil.Error):
                    worker.kill()
            self.process.kill()
        self.process.wait()
        self._folder.cleanup()


def wait_until(condition: Callable[[], object], timeout: float = START) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def role(command: str, bundle: Path, *options: str, patch: Patch | None = None) -> Iterator[Role]:
    started = Role(command, bundle, *options, patch=patch)
    try:
        yield started
    finally:
        started.end()


class Deployment:
    """A server and a dealer, and the means to connect to both."""

    def __init__(self, bundles: Path, server: Role, dealer: Role) -> None:
        self.bundles, self.server, self.dealer = bundles, server, dealer
        self.roles = {"server": server, "dealer": dealer}

    def connection(self, **options: Any) -> Connection:
        given: dict[str, Any] = {
            "security": Security("client", None, plaintext=True),
            "timeout": 20.0,
            "join_timeout": 20.0,
            **options,
        }
        if "dealer" not in given:
            given["dealer"] = self.dealer.address
        return Connection(self.bundles / "client", server=self.server.address, **given)


def answered(connection: Connection, prompt: list[int], count: int) -> tuple[list[int], list[int]]:
    """Tokens of an answer, and the new tokens of each of its steps."""
    found = list(connection.generate(prompt, max_tokens=count))
    return [t.token for t in found], [r.new for t in found for r in t.reports]


@contextmanager
def deployment(
    bundles: Path,
    *,
    serve: tuple[str, ...] = (),
    deal: tuple[str, ...] = (),
    patch: Patch | None = None,
) -> Any:
    """Both services, over plain TCP unless `serve` and `deal` give certificates.

    patch: for the dealer.
    """
    security = () if "--certs" in serve else ("--plaintext",)
    with role("deal", bundles, *security, *deal, patch=patch) as dealer:
        at = ("--dealer", str(dealer.address))
        with role("serve", bundles, *security, *at, "--rate", "0", *serve) as server:
            yield Deployment(bundles, server, dealer)
