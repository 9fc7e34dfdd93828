"""The server's desk: which client gets a session, which ones wait, and which are refused."""

from __future__ import annotations

from typing import Any

from mergec.runtime.roles.observe import PartyMetrics
from mergec.runtime.roles.rate_limit import Allowance
from mergec.runtime.roles.service import Desk, Worker
from mergec.runtime.roles.settings import Limits
from mergec.runtime.roles.turnover import Turnover
from mergec.runtime.session.handshake import new_token


class ServerDesk(Desk):
    """Decides which client gets a session, keeps the queue, and counts tokens per client."""

    def __init__(self, limits: Limits, metrics: PartyMetrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._running = metrics.gauge("sessions", "Sessions under way.")
        self._waiting = metrics.gauge("queue", "Clients that wait for a session.")
        self._ended = metrics.counter("sessions_ended", "Sessions, by how they ended.", "how")
        self._refused = metrics.counter("refused", "Refusals, by what was used up.", "what")
        self._turnover = Turnover(limits.sessions)
        self._seated: dict[int, str] = {}
        self._queue: list[Worker] = []
        self._allowances: dict[str, Allowance] = {}

    def asked(self, worker: Worker, message: dict[str, Any]) -> None:
        if message["kind"] == "place":
            worker.facts["name"] = message["name"]
            self._queue.append(worker)
            self._seat()
            if worker in self._queue and len(self._queue) > self._limits.queue:
                self._queue.remove(worker)
                waiting, running = len(self._queue), len(self._seated)
                busy = f"it is busy: {running} sessions, {waiting} clients wait"
                worker.tell({"refused": busy, "wait": self._turnover.wait(waiting)})
                self._refused.labels("sessions").inc()
            self._count()
        elif message["kind"] == "allowance":
            wait = self.allowance(worker.facts["name"]).wait()
            worker.tell({"wait": wait})
            if wait:
                self._refused.labels("tokens").inc()
        elif message["kind"] == "step":
            self._metrics.step(message["report"])
            self.allowance(worker.facts["name"]).spend(message["report"]["new"])
        elif message["kind"] == "wasted":
            self.allowance(worker.facts["name"]).spend(message["tokens"])
        elif message["kind"] == "end":
            self._ended.labels(message["how"]).inc()

    def left(self, worker: Worker) -> None:
        self._seated.pop(worker.pid, None)
        self._turnover.leave(worker.pid)
        if worker in self._queue:
            self._queue.remove(worker)
        self._seat()
        self._count()

    def _seat(self) -> None:
        """Give free sessions to the clients that have waited longest and may have one more."""
        for worker in list(self._queue):
            name = worker.facts["name"]
            taken = list(self._seated.values()).count(name)
            full = len(self._seated) >= self._limits.sessions
            if full or taken >= self._limits.client_sessions:
                continue
            self._queue.remove(worker)
            self._seated[worker.pid] = name
            self._turnover.take(worker.pid)
            worker.tell({"session": new_token()})
        for position, worker in enumerate(self._queue, 1):
            if worker.facts.get("position") != position:
                worker.facts["position"] = position
                worker.tell({"position": position})

    def allowance(self, name: str) -> Allowance:
        """The allowance of a client, kept across its sessions."""
        if len(self._allowances) > 10_000:
            self._allowances = {n: a for n, a in self._allowances.items() if a.wait()}
        return self._allowances.setdefault(name, Allowance(self._limits.rate))

    def _count(self) -> None:
        self._running.set(len(self._seated))
        self._waiting.set(len(self._queue))
