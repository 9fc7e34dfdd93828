"""At the server: has steps dealt that its client may request next."""

from __future__ import annotations

from typing import Any

from mergec.runtime.core.errors import BundleError, PartyError
from mergec.runtime.core.spec import ROLES, SERVER
from mergec.runtime.engine.trees import LINE
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.allowance import Allowance
from mergec.runtime.roles.settings import ServerSettings
from mergec.runtime.roles.worker import Parent
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.patience import patience
from mergec.runtime.session.requests import read_step
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.dealer_link import DealerReceiver
from mergec.runtime.transport.frames import Kind


class DealtAhead:
    """The steps of a session that are dealt before they are requested, within a server's limits."""

    def __init__(
        self,
        settings: ServerSettings,
        program: RoleProgram,
        parent: Parent,
        log: Any,
        session: MergecSession,
        channel: Channel,
        dealer: Channel,
        source: DealerReceiver,
    ) -> None:
        """channel: to the client. source: of what the dealer deals."""
        self._settings, self._program = settings, program
        self._parent, self._log = parent, log
        self._session = session
        self._channel, self._dealer, self._source = channel, dealer, source
        self._allowance = Allowance(settings.limits, program.manifest, parent)
        self._charged = 0
        self._full = False
        """Whether there was no room for what the client wanted dealt since its last step."""

    def deal(self, payload: memoryview) -> None:
        """Have a step dealt that the client may request next, unless there is no room for it."""
        session, channel, source = self._session, self._channel, self._source
        new, past, draw, place, split, branches = read_step(payload, channel.peer)
        limits = self._settings.limits
        most = min(n for n in (limits.length, self._program.manifest.max_length, 1 << 20) if n)
        if new < 1 or past < 0 or new + past > most or split or branches != LINE:
            raise PartyError(f"the client wants {new} tokens after {past} dealt, out of turn")
        mine = ROLES[SERVER]
        held = 0 if past == session.present else session.ahead.size(mine)
        used_up, wait = self._allowance.used_up()
        reason = ""
        if source.trouble:
            self._log.error("cannot hold what is dealt ahead", reason=source.trouble)
            reason = "it cannot hold more; see its log"
        elif wait:
            reason = used_up
        elif self._full or held + session.dealt(new, past, draw)[mine] > limits.ahead:
            # The sizes take a rehearsal: a client that goes on asking does not get one each time.
            self._full = True
            reason = f"it holds no more than {limits.ahead / 1e6:g} MB for a session"
        if reason:
            channel.send_json(Kind.REFUSED, reason=reason)
            return
        try:
            step = session.enter_ahead(bytes(payload), new, past, draw, place)
        except BundleError as error:
            raise PartyError(f"the client requests what cannot be dealt: {error}") from error
        self.charge()
        seconds = patience(self._program, [(new, past)], self._settings.timeout)
        for peer in (channel, self._dealer):
            peer.expect(seconds)
        source.expect(step.dealt[mine])
        self._dealer.send(Kind.AHEAD, payload)
        channel.send_json(Kind.ACCEPTED)

    def go_on(self) -> None:
        """Let the client ask for more, after a step."""
        self._full = False

    def charge(self) -> None:
        """Count what was dealt ahead for nothing as tokens that the client used."""
        wasted = self._session.ahead.wasted
        if wasted > self._charged:
            self._parent.tell(kind="wasted", tokens=wasted - self._charged)
            self._charged = wasted

    def close(self) -> None:
        """Charge for what has not come: a client that left could come back for more."""
        self._session.ahead.clear()
        self.charge()
