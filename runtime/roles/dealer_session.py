"""The dealer's side of a session: a process for each of the two parties, and a line between both.

The server's process deals; the client's passes on the client's requests, and what is dealt to it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from mergec.runtime.core.context import DealerContext
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, BusyError, PartyError, PeerEndedError
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER
from mergec.runtime.correlations.prg import derive
from mergec.runtime.engine.executor import Executor
from mergec.runtime.engine.trees import LINE
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.ranks.start import started
from mergec.runtime.roles.settings import DealerSettings
from mergec.runtime.roles.worker import Parent, played
from mergec.runtime.session.handshake import Origin, be_greeted, read_masks, read_token
from mergec.runtime.session.hello import Hello
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.patience import patience, setup_patience
from mergec.runtime.session.public_text import PublicText, read_lengths
from mergec.runtime.session.requests import Plan, branch, divide, read_step, turn
from mergec.runtime.session.steps import measured
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.connect import accept
from mergec.runtime.transport.dealer_link import ChannelBlockWriter, DealerSender
from mergec.runtime.transport.frames import Kind, ending
from mergec.runtime.transport.pulse import BEAT, Pulse

PARTIES = (ROLES[CLIENT], ROLES[SERVER])
_REQUESTS = (Kind.STEP, Kind.AHEAD, Kind.PLAN, Kind.DONE, Kind.END)
_REQUEST = 1 << 17
_NOTHING = memoryview(b"")
_LONGEST = 1 << 20
"""Most tokens of a step; the program's own limit is checked where the step is dealt."""

_PIECE = 1 << 16
"""Bytes of the client's stream that are passed on at once."""


class DealerSession:
    """One party's connection, in a process of its own."""

    def __init__(
        self,
        settings: DealerSettings,
        program: RoleProgram,
        connection: socket.socket,
        parent: Parent,
        log: Any,
    ) -> None:
        self._settings = settings
        self._program = program
        self._connection = connection
        self._parent = parent
        self._log = log
        self._channel: Channel | None = None
        self._line: socket.socket | None = None
        self._pulse = Pulse()
        self._ranks = ExitStack()
        self._answering = False
        self._allowed = 0.0
        """Seconds that the last step may take."""

    def play(self) -> None:
        with closing(self._pulse), self._ranks:
            how = played(self._run, self._fail, lambda: self._log)
        if self._line is not None:
            self._parent.tell(kind="end", how=how)

    def _fail(self, reason: str, stopped: bool = False, wait: int = 0) -> None:
        if stopped and self._line is not None:
            self._line.settimeout(0)
            fields = json.dumps({"reason": reason, "stopped": True}).encode()
            with suppress(PartyError):
                tell(self._line, "other party", Kind.ERROR, memoryview(fields))
        if self._channel is not None:
            self._channel.fail(reason, stopped, wait)

    def _run(self) -> None:
        settings, parent = self._settings, self._parent
        parent.idle = True
        channel = self._channel = accept(
            self._connection, settings.security, PARTIES, settings.timeout
        )
        hello = Hello.of(ROLES[DEALER], self._program.manifest)
        fields = be_greeted(channel, hello, PARTIES)
        token = read_token(fields, channel.peer)
        self._log = self._log.bind(peer=channel.peer, name=channel.name, session=token[:8])
        answer, descriptors = parent.ask(kind="claim", token=token, role=channel.peer)
        if "wait" in answer:
            wait = answer["wait"]
            raise BusyError(f"{answer['refused']}; try again in {wait} s", wait)
        if "refused" in answer:
            raise PartyError(answer["refused"])
        self._line = socket.socket(fileno=descriptors[0])
        self._line.settimeout(settings.timeout)
        salt = bytes.fromhex(answer["salt"])
        seeds = [Origin(bytes.fromhex(seed), salt) for seed in answer["seeds"]]
        self._log.info("session joined")
        channel.send(Kind.SEED, seeds[-1].encode())
        if channel.peer == ROLES[CLIENT]:
            self._relay(channel, self._line)
        else:
            most = self._program.manifest.max_length
            public = read_lengths(fields, most, channel.peer)
            masks = read_masks(fields, channel.peer)
            self._deal(channel, self._line, seeds[0], seeds[1], masks, public)
        self._log.info("session ended")

    def _wait(self, channel: Channel, line: socket.socket) -> set[int]:
        """Wait for this party, or for the process of the other one; returns where something came.

        Between answers the session may be ended.
        """
        self._parent.idle = not self._answering
        parent = self._parent.line.fileno()
        seconds = self._settings.idle_timeout
        if self._answering:
            seconds = max(seconds, self._allowed)  # the parties may still be at the last step
        ready = channel.readable(seconds, parent, line.fileno())
        if parent in ready:
            self._parent.hear()  # raises if the parent has ended; it sends nothing else
        if not ready:
            raise PartyError("the session was idle for too long")
        self._parent.idle = False
        return ready

    def _request(self, channel: Channel) -> tuple[Kind, memoryview]:
        """The request of this process's party."""
        kind, payload = channel.receive_any(_REQUESTS)
        self._answering = kind is Kind.STEP
        return kind, payload

    def _relay(self, channel: Channel, line: socket.socket) -> None:
        """Pass the client's requests to the process that deals, and what it deals to the client.

        Heartbeats are passed on, too, and not made here: the client waits for the one that deals.
        """
        kind = Kind.STEP
        while kind is not Kind.END:
            if line.fileno() in self._wait(channel, line):
                said = memoryview(hear(line, ROLES[SERVER]))
                if said[0] == Kind.ALIVE:
                    channel.beat()
                    continue
                if said[0] == Kind.MARK:
                    channel.expect(self._allowed)
                channel.send(Kind(said[0]), said[1:])
                channel.traffic.offline_sent += len(said) - 1
                continue
            kind, payload = self._request(channel)
            self._allowed = self._patience(kind, payload, channel)
            channel.expect(self._allowed)
            tell(line, ROLES[SERVER], kind, payload)

    def _patience(self, kind: Kind, payload: memoryview, channel: Channel) -> float:
        """Seconds that a step that the client requests may take, or an answer of its plan."""
        steps: list[tuple[int, int]] = []
        if kind in (Kind.STEP, Kind.AHEAD):
            new, past, *_ = read_step(payload, channel.peer)
            if not (0 <= new <= _LONGEST and 0 <= past <= _LONGEST):
                raise PartyError(f"{new} tokens after {past} are more than this program runs")
            steps = [(new, past)]
        elif kind is Kind.PLAN:
            plan = Plan.read(channel.object(payload), self._program.manifest, channel.peer)
            steps = plan.steps()
        return patience(self._program, steps, self._settings.timeout)

    def _deal(
        self,
        channel: Channel,
        line: socket.socket,
        client: Origin,
        server: Origin,
        masks: bytes | None,
        public: Sequence[int] = (),
    ) -> None:
        """Deal what both parties request. public: lengths of the session's public texts."""
        more = {**self._program.manifest.arithmetic, "salt": client.salt}
        streams = DealerSender(_LineBlockWriter(line)), DealerSender(ChannelBlockWriter(channel))
        streams[CLIENT].keep_pace(streams[SERVER])
        context = DealerContext(
            client.seed,
            server.seed,
            *streams,
            self._settings.device,
            weight_seed=masks,
            expand=self._settings.expand_masks,
            **more,
        )
        executor = Executor(self._program, context, None)
        session = MergecSession(executor, lambda: channel.traffic)
        self._pulse.beats += [partial(channel.beat, BEAT / 2), partial(_beat, line)]
        timeout = self._settings.timeout

        def allow(new: int, past: int) -> None:
            self._allowed = patience(self._program, [(new, past)], timeout)
            channel.expect(self._allowed)
            # The process of the client watches the client, and ends if it is silent.
            line.settimeout(self._allowed)

        channel.expect(setup_patience(self._program, timeout))
        line.settimeout(setup_patience(self._program, timeout))
        with self._pulse.working():
            context.ranks = self._ranks.enter_context(
                started(
                    ROLES[DEALER],
                    self._settings.ranks,
                    self._settings.device,
                    self._settings.threads,
                )
            )
            session.setup()
            session.enter_public([PublicText(length) for length in public])
        limit = self._program.manifest.max_length
        planned = False
        while True:
            kind, payload = self._agreed(channel, line)
            if kind is Kind.END:
                return
            if kind is Kind.PLAN:
                plan = Plan.read(channel.object(payload), self._program.manifest, channel.peer)
                if planned:
                    # The seeds of answers follow from the session's: they would be dealt again.
                    raise PartyError("a session deals for one plan; start another session")
                planned = True
                if context.offline_bytes:
                    raise PartyError("this program needs the dealer at the start of each session")
                if session.program.resends or not session.cached:
                    # What the last step takes is known only at that step: the number of hidden
                    # states, or all tokens again.
                    raise PartyError(
                        "answers of this program cannot be precomputed; use the dealer"
                    )
                for answer in range(plan.answers):
                    own = f"answer {answer}"
                    seeds = derive(client.seed, own), derive(server.seed, own)
                    session.use(DealerContext(*seeds, *streams, self._settings.device, **more))
                    with self._pulse.working():
                        for number, (new, past) in enumerate(plan.steps()):
                            self._parent.check()
                            allow(new, past)
                            if plan.steady is not None:
                                session.follow(number, new, past)
                            self._step(session, streams, new, past)
                        channel.send(Kind.MARK)
                        tell(line, ROLES[CLIENT], Kind.MARK)
            elif kind is Kind.AHEAD:
                new, past, draw, place, _, branches = read_step(payload, channel.peer)
                short = not limit or new + past <= limit
                if new < 1 or past < 0 or not short or branches != LINE:
                    raise PartyError(f"{new} tokens after {past} are more than this program runs")
                try:
                    session.enter_ahead(bytes(payload), new, past, draw, place)
                except BundleError as error:
                    raise PartyError(f"a step cannot be dealt ahead: {error}") from error
                allow(new, past)
                self._step(session, streams, new, past, draw)
                channel.send(Kind.MARK)
                tell(line, ROLES[CLIENT], Kind.MARK)
            elif kind is Kind.STEP:
                new, past, draw, place, split, branches = read_step(payload, channel.peer)
                if session.take_ahead(bytes(payload)):
                    allow(new, past)
                    continue
                turn(session, place, channel.peer)
                branch(session, branches, new, past, split, channel.peer)
                divide(session, split, new, channel.peer)
                if not session.allows(new, past) or (limit and new + past > limit):
                    raise PartyError(f"{new} tokens after {past} are more than this program runs")
                allow(new, past)
                self._step(session, streams, new, past, draw)

    def _agreed(self, channel: Channel, line: socket.socket) -> tuple[Kind, memoryview]:
        """The next request, once both parties have made it; the second must follow in time."""
        ready = self._wait(channel, line)
        with self._pulse.working():
            line.settimeout(self._settings.timeout)
            said = hear(line, ROLES[CLIENT]) if line.fileno() in ready else b""
            kind, payload = self._request(channel)
            said = said or hear(line, ROLES[CLIENT])
        if said != bytes([kind]) + payload:
            raise PartyError("the client and the server request different steps")
        return kind, payload

    def _step(
        self,
        session: MergecSession,
        streams: Sequence[DealerSender],
        new: int,
        past: int,
        draw: Draw | None = None,
    ) -> None:
        def work() -> None:
            session.step(new, past, draw=draw)
            streams[CLIENT].flush()  # the server's keeps pace with it

        with self._pulse.working():
            report = measured(session, new, past, work)
        self._parent.tell(kind="step", report=asdict(report))


class _LineBlockWriter:
    """Writes blocks for the client to the process that holds its connection."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def put(self, block: torch.Tensor) -> None:
        data = block.numpy().data
        for start in range(0, data.nbytes, _PIECE):
            tell(self._line, ROLES[CLIENT], Kind.BLOCK, data[start : start + _PIECE])

    def end(self) -> None:
        """The client ends its session itself."""


def tell(line: socket.socket, peer: str, kind: Kind, payload: memoryview = _NOTHING) -> None:
    """Send to the process of the session's other party; raises PartyError if it has ended."""
    try:
        line.sendmsg([bytes([kind]), payload])
    except TimeoutError as error:
        raise PartyError(f"the {peer} does not read what is sent to it") from error
    except OSError:
        while True:
            hear(line, peer)  # raises at the end of what it sent, or earlier if it said why


def hear(line: socket.socket, peer: str) -> bytes:
    """Receive from that process; raises PartyError if it sends nothing in time, or has ended."""
    said = b""
    try:
        said = line.recv(_REQUEST)
    except TimeoutError as error:
        raise PartyError(
            f"the {peer} did not request the step that the other party requests"
        ) from error
    except OSError:  # it left something unread when it ended
        with suppress(OSError):
            said = line.recv(_REQUEST, socket.MSG_DONTWAIT)
    if not said:
        raise PeerEndedError(f"the {peer} went away; see its own message")
    if said[0] == Kind.ERROR:
        raise ending(json.loads(said[1:]), peer)
    return said


def _beat(line: socket.socket) -> None:
    """Send a heartbeat to the process of the client, unless something is in its way."""
    with suppress(OSError):
        os.write(line.fileno(), bytes([Kind.ALIVE]))
