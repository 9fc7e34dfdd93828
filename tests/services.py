"""Servers and dealers as processes, for tests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from runtime.client import Connection
from runtime.transport.address import Address
from runtime.transport.connect import Security
from tests.roles import ROOT, environment

START = 60.0


class Role:
    """A role's process, and what it logs."""

    def __init__(self, command: str, bundle: Path, *options: str) -> None:
        # Opened for appending: reading here must not move where the processes write.
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "log"
        listen = ("--port", "0") if command == "proxy" else ("--listen", "127.0.0.1:0")
        with self._file.open("a") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "runtime.cli", command, str(bundle)),
                    *(*listen, *options),
                ],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

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
        """The `count`th log line of this event, once it is there."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = [line for line in self.log if line["event"] == event]
            if len(found) >= count:
                return found[count - 1]
            assert self.process.poll() is None or event == "stopped", self.output
            time.sleep(0.02)
        raise AssertionError(f"no {event!r}\n{self.output}")

    @property
    def address(self) -> Address:
        return Address.parse(self.wait_for("listening")["address"])

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes of the sessions under way."""
        return list(psutil.Process(self.process.pid).children())

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30.0) -> int:
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


@contextmanager
def role(command: str, bundle: Path, *options: str) -> Iterator[Role]:
    started = Role(command, bundle, *options)
    try:
        yield started
    finally:
        started.end()


class Deployment:
    """A server, a dealer, and the means to connect to both."""

    def __init__(self, bundles: Path, server: Role, dealer: Role) -> None:
        self.bundles, self.server, self.dealer = bundles, server, dealer

    def connection(self, **options: Any) -> Connection:
        given: dict[str, Any] = {
            "security": Security("client", None, plaintext=True),
            "timeout": 20.0,
            "join_timeout": 5.0,
            **options,
        }
        if "dealer" not in given:
            given["dealer"] = self.dealer.address
        return Connection(self.bundles / "client", server=self.server.address, **given)


@contextmanager
def deployment(bundles: Path, *, serve: tuple[str, ...] = (), deal: tuple[str, ...] = ()) -> Any:
    """Both services, over plain TCP unless `serve` and `deal` give certificates."""
    security = () if "--certs" in serve else ("--plaintext",)
    with role("deal", bundles, *security, *deal) as dealer:
        at = ("--dealer", str(dealer.address))
        with role("serve", bundles, *security, *at, *serve) as server:
            yield Deployment(bundles, server, dealer)
