"""At the client: has steps dealt while nobody asks for an answer, in a thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from mergec.runtime.core.draw import Draw
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.core.spec import CLIENT, ROLES, SERVER
from mergec.runtime.engine.rehearsal import step_cost
from mergec.runtime.session.ahead import AheadPlan
from mergec.runtime.session.conversations import Place
from mergec.runtime.session.drafting.pace import Seconds
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.requests import write_step
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.dealer_link import DealerReceiver
from mergec.runtime.transport.frames import Kind, printable

_REMEMBERED = 64
"""Measured steps of each kind that count."""

_BOTH = (False, True)


class Preparer:
    """Has steps dealt between the answers of one session; `stop` it before anything else is sent.

    It asks for one step at a time, so whoever stops it waits for no more than one.
    """

    def __init__(
        self,
        plan: AheadPlan,
        session: MergecSession,
        channels: Sequence[Channel],
        source: DealerReceiver,
        limits: Mapping[str, int],
        expect: Callable[[Sequence[tuple[int, int]]], object],
    ) -> None:
        """channels: to server and dealer. expect: told of the steps that are waited for."""
        self.told = ""
        """Why no further steps are dealt, if somebody should know."""
        self._plan, self._session, self._source = plan, session, source
        self._server, self._dealer = channels
        self._limits, self._expect = limits, expect
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._reason = ""
        self._measured = {dealt: deque[tuple[int, float]](maxlen=_REMEMBERED) for dealt in _BOTH}
        if not limits.get("ahead"):
            self.told = "nothing is dealt ahead; the server needs --prepare-disk"

    def start(self, draw: Draw) -> None:
        """Begin, or go on. draw: how the next answer's tokens will be chosen."""
        session = self._session
        if self.told or not session.continues or len(session.tokens) != session.length:
            return  # the next prompt continues none of these caches
        self._stopping.clear()
        self._thread = threading.Thread(
            target=self._run, args=(draw,), name="dealt-ahead", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Let the step that is dealt now be the last one; raises what has ended the session."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def steps(self) -> int:
        """Number of steps that are dealt and have not come yet."""
        return len(self._session.ahead)

    def fitting(self, place: Place, cached: int, prompt: int, draw: Draw) -> list[int]:
        """Tokens of the steps dealt ahead that the next prompt is fed by, in order; none if another
        text comes, or if fewer steps are faster.

        place, cached: which caches the prompt continues, and how many of its `prompt` tokens they
        have.
        """
        sizes, end = list[int](), cached
        for step in self._session.ahead.steps:
            if step.request != write_step(step.new, end, draw, place) or end + step.new > prompt:
                break
            sizes.append(step.new)
            end += step.new
        if not sizes:
            return []
        choices = {0, len(sizes), next((n for n, s in enumerate(sizes) if s == 1), len(sizes))}
        ready, live = (self._seconds(dealt, cached, prompt, draw) for dealt in (True, False))
        seconds = {}
        for count in choices:
            rest = prompt - cached - sum(sizes[:count])
            seconds[count] = sum(ready[new - 1] for new in sizes[:count])
            seconds[count] += live[rest - 1] if rest else 0.0
        return sizes[: min(choices, key=lambda n: (seconds[n], -n))]

    def learn(self, new: int, seconds: float, dealt: bool) -> None:
        """Note what a step of `new` tokens took. dealt: whether it was dealt ahead."""
        self._measured[dealt].append((new, seconds))

    def _seconds(self, dealt: bool, cached: int, prompt: int, draw: Draw) -> list[float]:
        """Seconds of steps of 1 to all of the prompt's tokens: by the cost model at first, and more
        and more by what steps have taken, as computation does not show in the model."""
        most = prompt - cached
        rehearsal, modelled = self._session.rehearsal, dict[int, float]()
        network = NETWORKS[self._session.program.manifest.network]
        for new in {1, most}:
            if rehearsal is None:
                continue  # only the dealer has none
            cost = step_cost(rehearsal, new, prompt - new, draw)
            waiting = cost.waiting(network)
            if dealt:
                modelled[new] = waiting.prepared
            else:
                modelled[new] = waiting.total + network.making(cost.dealt)
        line = Seconds(modelled or {1: 0.0})
        for new, seconds in self._measured[dealt]:
            line.learn(new, seconds)
        return line.of(most)

    def _run(self, draw: Draw) -> None:
        session, limits = self._session, self._limits
        most = [n for n in (session.program.manifest.max_length, limits.get("length", 0)) if n]
        steps = self._plan.steps(
            session.present, len(session.ahead), session.ahead_end, min(most, default=1 << 20)
        )
        try:
            for new, past in steps:
                if self._stopping.is_set() or not self._deal(new, past, draw):
                    return
        except BaseException as error:  # noqa: BLE001  (whoever stops this thread raises it)
            self._failure = error

    def _tell(self, reason: str) -> None:
        """Have somebody told why no more is dealt, once for each reason."""
        if reason != self._reason:
            self._reason = reason
            self.told = f"{len(self._session.ahead)} steps are dealt ahead, and no more: {reason}"

    def _deal(self, new: int, past: int, draw: Draw) -> bool:
        """Have a step dealt; False if there is no room for it."""
        session, ahead = self._session, self._session.ahead
        dealt = session.dealt(new, past, draw)
        anew = past == session.present
        bounds = {CLIENT: self._plan.disk, SERVER: self._limits.get("ahead", 0)}
        for party, bound in bounds.items():
            role = ROLES[party]
            if (0 if anew else ahead.size(role)) + dealt[role] > bound:
                return False
        if self._source.trouble:
            self._tell(f"the disk takes no more: {self._source.trouble}")
            return False
        place = Place.of(session.conversation)
        request = write_step(new, past, draw, place)
        self._expect([(new, past)])
        self._server.send(Kind.AHEAD, request)
        kind, fields = self._server.receive_json(Kind.ACCEPTED, Kind.REFUSED)
        if kind is Kind.REFUSED:
            self._tell(f"the server says: {printable(str(fields.get('reason', '')))}")
            return False
        step = session.enter_ahead(request, new, past, draw, place)
        self._source.expect(step.dealt[ROLES[CLIENT]])
        self._dealer.send(Kind.AHEAD, request)
        self._source.await_marks()
        return True
