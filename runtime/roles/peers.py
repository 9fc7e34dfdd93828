"""A client's channels to the server, and to the dealer that deals for a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

from mergec.runtime.core.errors import BusyError, MergecError, PartyError
from mergec.runtime.core.spec import ROLES, SERVER
from mergec.runtime.program.encoding import is_a
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.session.handshake import Origin, greet, join_dealer
from mergec.runtime.session.hello import Hello
from mergec.runtime.session.patience import patience, setup_patience
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.connect import Security, connect
from mergec.runtime.transport.frames import Kind
from mergec.runtime.transport.pulse import BEAT, Pulse

QUEUE_TIMEOUT = 3600.0
"""Seconds that a client waits for a session at a busy server."""


class Peers:
    """Whom a client talks to, in one session at a time.

    channels: to the server, and then to the dealer if there is one.
    """

    def __init__(
        self,
        program: RoleProgram,
        server: Address,
        dealer: Address | None,
        security: Security,
        *,
        timeout: float,
        join_timeout: float,
        on_wait: Callable[[int], object],
    ) -> None:
        """timeout, join_timeout: in seconds. on_wait: called with the position in the server's
        queue."""
        self.channels: list[Channel] = []
        self.timeout = timeout
        self.limits: dict[str, int] = {}
        """What the server said at last that it allows its clients."""
        self._program = program
        self._server, self._dealer, self._security = server, dealer, security
        self._join_timeout = join_timeout
        self._on_wait = on_wait
        self._pulse = Pulse()

    def admitted(self, hello: Hello, wanted: dict[str, Any]) -> tuple[Channel, dict[str, Any]]:
        """Connect to the server and wait for a session; returns what it says of that, too."""
        channel = connect(
            self._server, ROLES[SERVER], self._security, self.timeout, self._join_timeout
        )
        self.channels.append(channel)
        greet(channel, hello, **wanted)
        self._pulse.beats.append(partial(channel.beat, BEAT / 2))
        channel.expect(QUEUE_TIMEOUT)
        kind, fields = Kind.QUEUED, dict[str, Any]()
        while kind is Kind.QUEUED:
            kind, fields = channel.receive_json(Kind.QUEUED, Kind.ADMITTED)
            if kind is Kind.QUEUED and is_a(fields.get("position"), int):
                self._on_wait(fields["position"])
        channel.expect(setup_patience(self._program, self.timeout))
        self.limits = {key: value for key, value in fields.items() if is_a(value, int)}
        return channel, fields

    def join(self, hello: Hello, token: str) -> tuple[Channel, Origin]:
        """Connect to the dealer; returns where this party's randomness comes from, too.

        token: the session's secret name.
        """
        if self._dealer is None:
            raise MergecError("no dealer was given; give a dealer or a store")
        dealer, origin = join_dealer(
            self._dealer, hello, self._security, token, self.timeout, self._join_timeout
        )
        self.channels.append(dealer)
        self._pulse.beats.append(partial(dealer.beat, BEAT / 2))
        dealer.expect(setup_patience(self._program, self.timeout))
        return dealer, origin

    def working(self) -> AbstractContextManager[None]:
        """Within this context, heartbeats tell the peers that this party is at work."""
        return self._pulse.working()

    def expect(self, steps: Sequence[tuple[int, int]]) -> None:
        """Let heartbeats of the peers extend waits for as long as these steps may take."""
        for channel in self.channels:
            channel.expect(patience(self._program, steps, self.timeout))

    def fail(self, error: BaseException) -> None:
        """Tell the peers why the session ends here."""
        # What stops the caller stops the session: nothing has failed.
        stopped = not isinstance(error, Exception)
        reason = "it was stopped" if stopped else "it cannot go on; see its error message"
        for channel in self.channels:
            wait = error.wait if isinstance(error, BusyError) else 0
            channel.fail(str(error) if isinstance(error, PartyError) else reason, stopped, wait)

    def leave(self) -> None:
        """Tell the peers that the session is over, and close the channels."""
        for channel in self.channels:
            with suppress(PartyError):  # the other side may have ended it before
                channel.send(Kind.END)
            channel.close()

    def forget(self) -> None:
        """Get ready for another session, after the last one has ended."""
        self.channels = []
        self._pulse.close()
        self._pulse = Pulse()
