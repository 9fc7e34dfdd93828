"""A role that serves many sessions: one process listens, and forks one for each connection.

A session's process shares the bundle's tensors with its parent, page by page, and ends with the
session: everything the session allocated or opened goes with it, and a crash affects no other
session. The parent handles neither TLS nor tensors. It decides what concerns all sessions (places,
rates, pairs) and keeps the counters; sessions ask it over a socket of their own.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from mergec.runtime.roles.worker import DATAGRAM, Parent

_TICK = 0.5
_LAST_GRACE = 5.0
MAX_STRANGERS = 64
"""Maximum number of connections that have not identified themselves yet. Beyond it, a new one
replaces the one that has been silent longest, so that a flood of connections is bounded in memory
and keeps nobody out."""

_STRANGER_TIME = 1.0
"""Seconds that every connection has to identify itself before a new one may replace it; until
then, at the maximum, no connection is accepted."""


@dataclass
class Worker:
    """The parent's view of a session's process."""

    pid: int
    line: socket.socket
    stranger: bool = True
    """Whether it does not know its peer yet, and has not been replaced."""
    since: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)
    """What the desk remembers about it."""

    def tell(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        """Send it a message. If it has ended, `Service` notices that."""
        with suppress(OSError):
            socket.send_fds(self.line, [json.dumps(message).encode()], list(descriptors))


class Desk(ABC):
    """Decides in the parent process what concerns all sessions."""

    @abstractmethod
    def asked(self, worker: Worker, message: dict[str, Any]) -> None:
        """Handle a message of a worker."""

    @abstractmethod
    def left(self, worker: Worker) -> None:
        """Handle the end of a worker, whatever the cause."""

    def tick(self) -> None:  # noqa: B027  (most desks have nothing to do)
        """Called about twice a second."""


Work = Callable[[socket.socket, Parent], None]
"""Runs a session in its own process."""


class Service:
    """Listens, forks a process for each connection, and watches them, until told to stop."""

    def __init__(self, listener: socket.socket, work: Work, desk: Desk, grace: float) -> None:
        """`work` runs a session in its own process; `grace`: seconds for answers to finish."""
        self._listener = listener
        self._work = work
        self._desk = desk
        self._grace = grace
        self._workers: dict[int, Worker] = {}
        self._selector = selectors.DefaultSelector()
        self._stop_at: float | None = None
        self._interrupted = False
        self._told = 0

    def run(self) -> bool:
        """Serve until SIGTERM or SIGINT, and then until the running sessions have ended.

        Returns whether it was SIGINT.
        """
        waker, woken = socket.socketpair()
        waker.setblocking(False)
        woken.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, self._signalled)
        self._listener.setblocking(False)
        self._selector.register(woken, selectors.EVENT_READ)
        listening = False
        while self._stop_at is None or self._workers:
            wanted = self._stop_at is None and self._has_room()
            if wanted != listening:
                if wanted:
                    self._selector.register(self._listener, selectors.EVENT_READ)
                else:
                    self._selector.unregister(self._listener)
                listening = wanted
            for key, _ in self._selector.select(_TICK):
                if key.fileobj is woken:
                    with suppress(BlockingIOError):
                        woken.recv(4096)
                elif key.fileobj is self._listener:
                    self._accept()
                else:
                    self._hear(key.data)
            self._reap()
            self._press()
            self._desk.tick()
        self._listener.close()
        signal.set_wakeup_fd(-1)
        waker.close()
        woken.close()
        return self._interrupted

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD and self._stop_at is None:
            self._stop_at = time.monotonic()
            self._interrupted = number == signal.SIGINT

    def _strangers(self) -> list[Worker]:
        """The oldest first."""
        return [worker for worker in self._workers.values() if worker.stranger]

    def _has_room(self) -> bool:
        """Whether one more connection may be accepted."""
        strangers = self._strangers()
        full = len(strangers) >= MAX_STRANGERS
        return not full or time.monotonic() - strangers[0].since > _STRANGER_TIME

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it was closed, or file descriptors are exhausted for the moment
        strangers = self._strangers()
        if len(strangers) >= MAX_STRANGERS:
            strangers[0].stranger = False
            with suppress(ProcessLookupError):
                os.kill(strangers[0].pid, signal.SIGKILL)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
        except OSError:
            for end in (connection, ours, theirs):
                end.close()
            return
        if pid == 0:
            self._become_worker(connection, ours, theirs)
        connection.close()
        theirs.close()
        ours.setblocking(False)
        worker = self._workers[pid] = Worker(pid, ours)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _become_worker(
        self, connection: socket.socket, ours: socket.socket, theirs: socket.socket
    ) -> None:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            parent = Parent(theirs)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            self._listener.close()
            ours.close()
            for worker in self._workers.values():
                worker.line.close()
            self._work(connection, parent)
            code = 0
        finally:
            # Nothing of the parent may run here: no exit handlers, no buffers, no threads.
            os._exit(code)

    def _hear(self, worker: Worker) -> None:
        try:
            data = worker.line.recv(DATAGRAM)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            worker.stranger = False
            self._desk.asked(worker, json.loads(data))
        else:
            self._selector.unregister(worker.line)
            worker.line.close()

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                worker = self._workers.pop(found[0], None)
                if worker is not None:
                    self._drain(worker)
                    self._desk.left(worker)

    def _drain(self, worker: Worker) -> None:
        """Handle what it sent before it ended."""
        with suppress(OSError, ValueError):
            while worker.line.fileno() >= 0 and (data := worker.line.recv(DATAGRAM)):
                self._desk.asked(worker, json.loads(data))
        if worker.line.fileno() >= 0:
            self._selector.unregister(worker.line)
            worker.line.close()

    def _press(self) -> None:
        """When stopping: ask the workers to end, insist after the grace, and at last kill them."""
        if self._stop_at is None:
            return
        passed = time.monotonic() - self._stop_at
        steps = (0.0, self._grace, self._grace + _LAST_GRACE)
        while self._told < len(steps) and passed >= steps[self._told]:
            self._told += 1
            last = self._told == len(steps)
            for pid in self._workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if last else signal.SIGTERM)
