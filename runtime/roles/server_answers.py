"""The answers that a server gives in one client's session."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from mergec.runtime.core.errors import PartyError, PeerEndedError
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.allowance import Allowance
from mergec.runtime.roles.dealt_ahead import DealtAhead
from mergec.runtime.roles.settings import ServerSettings
from mergec.runtime.roles.worker import Parent
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.patience import patience
from mergec.runtime.session.requests import Schedule, branch, divide, read_step, turn, whole
from mergec.runtime.session.steps import measured
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.dealer_link import DealerReceiver
from mergec.runtime.transport.frames import Kind
from mergec.runtime.transport.pulse import Pulse

_LOOK = 1.0
"""Seconds between two checks of the dealer while the client is idle."""


class ServerAnswers:
    """Serves answers until the client ends the session."""

    def __init__(
        self,
        settings: ServerSettings,
        program: RoleProgram,
        parent: Parent,
        pulse: Pulse,
        session: MergecSession,
        channel: Channel,
        *,
        dealt: tuple[Channel, DealerReceiver] | None = None,
        ahead: DealtAhead | None = None,
        take: Callable[[], Schedule] | None = None,
    ) -> None:
        """channel: to the client. dealt: the channel to the dealer, and what comes from it.

        ahead: has steps dealt that may come later, if that is offered. take: uses up the next
        answer of the store, after the client has; returns the steps that it was dealt for.
        """
        self._settings, self._program = settings, program
        self._parent, self._pulse = parent, pulse
        self._session, self._channel = session, channel
        self._dealer: Channel | None = None
        self._source: DealerReceiver | None = None
        if dealt is not None:
            self._dealer, self._source = dealt
        self._ahead, self._take = ahead, take
        self._allowance = Allowance(settings.limits, program.manifest, parent)

    def serve(self) -> None:
        """Serve answers; raises PartyError if the session cannot go on."""
        channel, ahead = self._channel, self._ahead
        kinds = (Kind.BEGIN, Kind.END, *((Kind.AHEAD,) if ahead is not None else ()))
        while True:
            self._await()
            kind, payload = channel.receive_any(kinds)
            if kind is Kind.END:
                return
            if ahead is not None and kind is Kind.AHEAD:
                ahead.deal(payload)
                continue
            fields = channel.object(payload)
            if fields.get("salt") != self._session.salt.hex():
                raise PartyError(
                    "the client has another salt than this server, so the dealer told them "
                    "different ones; start another session, and check the dealer"
                )
            length = whole(fields, "length", 1, 1 << 30, channel.peer)
            tokens = whole(fields, "tokens", 1, 1 << 30, channel.peer)
            refusal = self._allowance.refusal(length, tokens)
            if refusal:
                channel.send_json(Kind.REFUSED, **refusal)
                continue
            channel.send_json(Kind.ACCEPTED)
            self._answer(length, tokens, self._take() if self._take is not None else None)

    def _await(self) -> None:
        """Wait for the client's next request. Between answers the session may be ended."""
        channel, parent = self._channel, self._parent
        parent.idle = True
        deadline = time.monotonic() + self._settings.idle_timeout
        line = parent.line.fileno()
        while channel.fileno() not in (ready := channel.readable(_LOOK, line)):
            if line in ready:
                parent.hear()  # raises if the parent has ended; it sends nothing else
            if self._source is not None and self._source.ended:
                raise PeerEndedError("the dealer went away; see its own message")
            if time.monotonic() > deadline:
                raise PartyError("the session was idle for too long; start another one")
        parent.idle = False

    def _answer(self, length: int, tokens: int, schedule: Schedule | None) -> None:
        """Run the steps of one answer.

        length, tokens: most tokens of its prompt, and of the answer. schedule: of a stored answer,
        which bounds it.
        """
        session, channel, ahead = self._session, self._channel, self._ahead
        limit = length + tokens
        # Stored steps that look alike reach beyond an answer that is shorter than their plan.
        steady = schedule is not None and schedule.branches
        reach = limit + (self._program.manifest.speculate_up_to if steady else 0)
        # A token of the answer may take a step with as many wrong drafts as the program checks.
        most = limit + tokens * self._program.manifest.speculate_up_to
        computed = 0
        while True:
            kind, payload = channel.receive_any((Kind.STEP, Kind.DONE))
            if kind is Kind.DONE:
                self._relay(kind, payload)
                return
            new, past, draw, place, split, branches = read_step(payload, channel.peer)
            if place.conversation >= self._settings.limits.conversations:
                held = self._settings.limits.conversations
                raise PartyError(f"the client asks for more than {held} conversations at once")
            session.take_ahead(bytes(payload))
            if ahead is not None:
                ahead.charge()
            turn(session, place, channel.peer)
            branch(session, branches, new, past, split, channel.peer)
            divide(session, split, new, channel.peer)
            if not session.allows(new, past) or new + past > reach:
                raise PartyError(f"the client asks for {new} tokens after {past}, out of turn")
            computed += new
            # Rolling back, an answer of bounded length could go on for ever.
            if schedule is None and session.cached and computed > most:
                raise PartyError(
                    f"the client asks for {computed} tokens in an answer of {limit}; start another"
                )
            if schedule is not None:
                number, left_out = schedule.check(
                    new, past, draw, channel.peer, place, split, branches
                )
                if schedule.branches:
                    session.follow(number, new, past, left_out)
            seconds = patience(self._program, [(new, past)], self._settings.timeout)
            for peer in (channel, self._dealer):
                if peer is not None:
                    peer.expect(seconds)
            with self._pulse.working():
                self._relay(kind, payload)
                work = partial(session.step, new, past, draw=draw)
                report = measured(session, new, past, work)
            if ahead is not None:
                ahead.go_on()
            self._parent.tell(kind="step", report=asdict(report))

    def _relay(self, kind: Kind, payload: memoryview) -> None:
        """Pass a request of the client on to the dealer."""
        if self._dealer is not None:
            self._dealer.send(kind, payload)
