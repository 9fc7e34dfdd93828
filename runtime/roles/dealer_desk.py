"""The dealer's desk: brings the two parties of each session together."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

from mergec.runtime.core.spec import ROLES, SERVER
from mergec.runtime.correlations.dpf import new_salt
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.roles.observe import Metrics
from mergec.runtime.roles.service import Desk, Worker
from mergec.runtime.roles.turnover import Turnover


@dataclass
class _Pending:
    """A session that one party has joined."""

    first: Worker
    role: str
    seeds: tuple[str, str]
    salt: str
    line: socket.socket
    since: float


class DealerDesk(Desk):
    """Gives the processes of a session's two parties seeds, a salt, and a line to each other."""

    def __init__(self, sessions: int, metrics: Metrics, wait: float) -> None:
        """`wait`: seconds within which a session's second party must join."""
        self._sessions = sessions
        self._turnover = Turnover(sessions)
        self._metrics = metrics
        self._running = metrics.gauge("sessions", "Sessions under way.")
        self._ended = metrics.counter("sessions_ended", "Connections, by how they ended.", "how")
        self._wait = wait
        self._pending: dict[str, _Pending] = {}
        self._servers: set[int] = set()

    def asked(self, worker: Worker, message: dict[str, Any]) -> None:
        if message["kind"] == "claim":
            self._claim(worker, message["token"], message["role"])
        elif message["kind"] == "step":
            self._metrics.step(message["report"])
        elif message["kind"] == "end":
            self._ended.labels(message["how"]).inc()

    def _claim(self, worker: Worker, token: str, role: str) -> None:
        found = self._pending.get(token)
        if found is None:
            if len(self._servers) + len(self._pending) >= self._sessions:
                busy = f"it is busy with {self._sessions} sessions"
                worker.tell({"refused": busy, "wait": self._turnover.wait(0)})
                return
            # Seeds are fresh for every pair, so a name that is used again repeats no mask.
            seeds, salt = (new_seed().hex(), new_seed().hex()), new_salt().hex()
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._pending[token] = _Pending(worker, role, seeds, salt, theirs, time.monotonic())
            self._answer(worker, role, seeds, salt, mine)
        elif found.role == role:
            worker.tell({"refused": f"another {role} has joined this session"})
        else:
            del self._pending[token]
            self._answer(worker, role, found.seeds, found.salt, found.line)

    def _answer(
        self, worker: Worker, role: str, seeds: tuple[str, str], salt: str, line: socket.socket
    ) -> None:
        if role == ROLES[SERVER]:
            self._servers.add(worker.pid)
            self._turnover.take(worker.pid)
            self._running.set(len(self._servers))
        shown = seeds if role == ROLES[SERVER] else seeds[:1]
        worker.tell({"seeds": shown, "salt": salt}, (line.fileno(),))
        line.close()

    def left(self, worker: Worker) -> None:
        self._servers.discard(worker.pid)
        self._turnover.leave(worker.pid)
        self._running.set(len(self._servers))
        self._forget(lambda pending: pending.first is worker)

    def tick(self) -> None:
        now = time.monotonic()
        self._forget(lambda pending: now - pending.since > self._wait)

    def _forget(self, gone: Any) -> None:
        for token in [token for token, pending in self._pending.items() if gone(pending)]:
            self._pending.pop(token).line.close()
