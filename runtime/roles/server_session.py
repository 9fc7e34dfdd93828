"""The server's side of one client's session, in a process of its own.

Each session has masks of its own, so the server sends W - B once per session: 8 bytes per weight. A
server with a key reuses its static masks B, and a client may keep W - B.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from mergec.runtime.core.context import ByteSource, ServerContext
from mergec.runtime.core.errors import BundleError, BusyError, PartyError, PeerEndedError
from mergec.runtime.core.memory import release_freed_memory
from mergec.runtime.core.spec import CLIENT, ROLES, SERVER, Vis
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.engine.executor import Executor
from mergec.runtime.engine.trees import LINE
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.ranks.start import started
from mergec.runtime.roles.settings import ServerSettings
from mergec.runtime.roles.worker import Parent, played
from mergec.runtime.session.handshake import (
    PREPARE,
    SESSION,
    STORED,
    Origin,
    be_greeted,
    join_dealer,
)
from mergec.runtime.session.hello import Hello
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.patience import patience, setup_patience
from mergec.runtime.session.public_text import PublicText, read_digests
from mergec.runtime.session.requests import (
    Plan,
    Schedule,
    branch,
    divide,
    read_step,
    turn,
    whole,
)
from mergec.runtime.session.steps import measured
from mergec.runtime.session.stores.folder import remove_store
from mergec.runtime.session.stores.format import Header, StoreError, is_store, new_store
from mergec.runtime.session.stores.journal import Head, read_tag, tag_of
from mergec.runtime.session.stores.kept import mask_seed, name_of
from mergec.runtime.session.stores.reader import NoCorrections, Store
from mergec.runtime.session.stores.writer import StoreWriter
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.connect import accept
from mergec.runtime.transport.dealer_link import ChannelBlockReader, DealerReceiver
from mergec.runtime.transport.frames import MAX_BLOCK, Kind
from mergec.runtime.transport.pulse import BEAT, Pulse
from mergec.runtime.transport.spool import Spool

AHEAD_BYTES = 64 << 20
"""Bytes that a session takes from the dealer before it uses them."""

_LOOK = 1.0
"""Seconds between two checks of the dealer while the client is idle, and between two messages to
the client while the dealer deals."""


class ServerSession:
    """One client's session, in a process of its own."""

    def __init__(
        self,
        settings: ServerSettings,
        program: RoleProgram,
        encoded: dict[str, torch.Tensor],
        digest: str,
        connection: socket.socket,
        parent: Parent,
        log: Any,
        public: Mapping[str, PublicText] | None = None,
        intact: Callable[[], bool] = lambda: True,
    ) -> None:
        """public: texts that the client may name, by digest.

        intact: whether the weights are those that `digest` is of. Under masks that outlast a
        session, others would be opened under the masks of these.
        """
        self._settings = settings
        self._program = program
        self._encoded, self._digest = encoded, digest
        self._public = public or {}
        self._intact = intact
        self._connection = connection
        self._parent = parent
        self._log = log
        self._channel: Channel | None = None
        self._dealer: Channel | None = None
        self._pulse = Pulse()
        self._ranks = ExitStack()
        self._seated = False
        self._charged = 0
        self._full = False
        """Whether there was no room for what the client wanted dealt since its last step."""

    def play(self) -> None:
        with self._ranks:
            how = played(self._run, self._fail, lambda: self._log)
        if self._seated:
            self._parent.tell(kind="end", how=how)

    def _fail(self, reason: str, stopped: bool = False, wait: int = 0) -> None:
        for channel in (self._channel, self._dealer):
            if channel is not None:
                channel.fail(reason, stopped, wait)

    def _expect(self, seconds: float) -> None:
        """Let heartbeats of both peers extend waits for so long from now on."""
        for channel in (self._channel, self._dealer):
            if channel is not None:
                channel.expect(seconds)

    def _run(self) -> None:
        settings = self._settings
        self._parent.idle = True
        channel = self._channel = accept(
            self._connection, settings.security, (ROLES[CLIENT],), settings.timeout
        )
        hello = Hello.of(ROLES[SERVER], self._program.manifest)
        fields = be_greeted(channel, hello, (ROLES[CLIENT],))
        self._pulse.beats.append(partial(channel.beat, BEAT / 2))
        purpose = fields.get("purpose")
        self._log = self._log.bind(client=channel.name)
        if not self._intact():
            raise PartyError("the server's bundle was written to; it has to be started again")
        store = self._find_store(fields, channel) if purpose == STORED else None
        public = self._agreed(fields, channel) if purpose == SESSION else []
        with self._pulse.working():
            token = self._place(channel)
        self._log = self._log.bind(session=token[:8])
        self._log.info("session began", purpose=str(purpose))
        masks = self._masks(purpose, store, channel.name)
        offered: dict[str, Any] = {"masks": name_of(masks)} if masks else {}
        if store is not None:
            offered["head"] = store.journal().head.fields()
        channel.send_json(Kind.ADMITTED, session=token, **asdict(settings.limits), **offered)
        self._parent.idle = False
        self._expect(setup_patience(self._program, settings.timeout))
        if store is not None:
            self._serve_stored(store, channel, masks, tag_of(token))
        elif purpose == PREPARE:
            # All answers share the static masks, so these have a seed that nothing else follows
            # from.
            static = new_seed()
            self._prepare(channel, self._join(hello, token, masks=static.hex()), static)
        elif purpose == SESSION:
            told: dict[str, Any] = {"masks": masks.hex()} if masks else {}
            # Rows that are not kept are computed here, by a client that has its place.
            with self._pulse.working():
                texts = [self._public[name] for name in public]
            if texts:
                told["public"] = [text.length for text in texts]
            self._serve_dealt(channel, self._join(hello, token, **told), masks, texts)
        else:
            raise PartyError("the client requests something that this server does not offer")
        channel.close()
        self._log.info("session ended")

    def _masks(self, purpose: object, store: Store | None, client: str) -> bytes | None:
        """Seed of the static masks that this client's later sessions reuse, if there are any."""
        if any(spec.vis is Vis.SHARED for spec in self._program.constants):
            return None
        if store is not None:
            return store.static
        if purpose != SESSION or not self._settings.store_key:
            return None
        program = self._program.manifest.program_hash
        return mask_seed(self._settings.store_key, program, client, self._digest)

    def _agreed(self, fields: dict[str, Any], channel: Channel) -> list[str]:
        """The public texts that the client names; raises PartyError if one is not served here."""
        named = read_digests(fields, channel.peer)
        unknown = [name for name in named if name not in self._public]
        if unknown:
            raise PartyError(
                f"public text {unknown[0][:8]} is none that the server agrees to; start it with "
                "--public-prompt, --public-block and the same files and tokenizer, or leave the "
                "text out"
            )
        return named

    def _join(self, hello: Hello, token: str, **told: Any) -> tuple[Channel, Origin]:
        settings = self._settings
        if settings.dealer is None:
            raise PartyError("this server has no dealer; use stored randomness")
        with self._pulse.working():
            dealer, origin = join_dealer(
                settings.dealer,
                hello,
                settings.security,
                token,
                settings.timeout,
                settings.join_timeout,
                **told,
            )
        self._dealer = dealer
        dealer.expect(setup_patience(self._program, settings.timeout))
        self._pulse.beats.append(partial(dealer.beat, BEAT / 2))
        return dealer, origin

    def _serve_dealt(
        self,
        channel: Channel,
        joined: tuple[Channel, Origin],
        masks: bytes | None,
        public: Sequence[PublicText],
    ) -> None:
        """Serve a session whose randomness the dealer deals step by step."""
        dealer, origin = joined
        blocks = ChannelBlockReader(dealer, self._settings.idle_timeout)
        held = self._settings.limits.ahead
        source = DealerReceiver(
            blocks, AHEAD_BYTES, self._settings.timeout, Spool() if held else None
        )
        context = self._context(origin, source, masks)
        session = self._begin(channel, context, masks, public, source.skip)

        def watch() -> None:
            if source.ended:
                raise PeerEndedError("the dealer went away; see its own message")

        ahead = partial(self._deal_ahead, session, channel, dealer, source)
        try:
            self._answers(session, channel, dealer.send, watch, ahead=ahead if held else None)
        finally:
            # A client that leaves pays for what it had dealt, or it could come back for more.
            session.ahead.clear()
            self._charge(session)
        dealer.send(Kind.END)
        dealer.close()

    def _serve_stored(
        self, store: Store, channel: Channel, masks: bytes | None, tag: bytes
    ) -> None:
        """Serve a session whose randomness is in a store; `tag`: the session's in journals."""
        # Masks that the setup drew would be the same in each session from this store.
        fresh = Origin(new_seed(), store.salt)
        session = self._begin(channel, self._context(fresh, NoCorrections(), store.static), masks)
        plan = store.header.plan

        def take() -> Schedule:
            client = Head.read(channel.receive_json(Kind.TAKEN)[1], channel.peer)
            _, seed, corrections = store.take(tag, client)
            context = self._context(Origin(seed, store.salt), corrections)
            session.use(context, corrections.skip)
            return plan.schedule()

        self._answers(session, channel, lambda *_: None, lambda: None, take)
        store.close()

    def _context(
        self, origin: Origin, source: ByteSource, masks: bytes | None = None
    ) -> ServerContext:
        return ServerContext(
            origin.seed, source, self._settings.device, weight_seed=masks, salt=origin.salt,
            **self._program.manifest.arithmetic,
        )  # fmt: skip

    def _begin(
        self,
        channel: Channel,
        context: ServerContext,
        masks: bytes | None,
        public: Sequence[PublicText] = (),
        skip: Callable[[int], object] = lambda _: None,
    ) -> MergecSession:
        """Set the session up: send the masked weights, unless the client has kept them, and rows
        of public text. skip: see `MergecSession`."""
        with self._pulse.working():
            return self._set_up(channel, context, masks, public, skip)

    def _set_up(
        self,
        channel: Channel,
        context: ServerContext,
        masks: bytes | None,
        public: Sequence[PublicText],
        skip: Callable[[int], object],
    ) -> MergecSession:
        settings, kept = self._settings, False
        # They end with the session, before which nothing needs them.
        context.ranks = self._ranks.enter_context(
            started(
                ROLES[SERVER],
                settings.ranks,
                settings.device,
                settings.threads,
                file=self._program.words_file,
            )
        )
        if masks:
            kept = channel.receive_json(Kind.KEPT)[1].get("kept") is True
        executor = Executor(
            self._program, context, channel, self._encoded, kept={} if kept else None
        )
        session = MergecSession(executor, lambda: channel.traffic, skip)
        session.setup()
        session.enter_public(public)
        release_freed_memory()
        self._log.info("set up", kept=kept)
        return session

    def _find_store(self, fields: dict[str, Any], channel: Channel) -> Store:
        """This server's part of the client's store."""
        settings, number = self._settings, fields.get("store")
        if settings.stores is None or not is_store(number):
            raise PartyError("this server stores no randomness; start a session with the dealer")
        place = settings.stores / str(number)
        if not place.is_dir():
            raise PartyError(f"this server has no store {str(number)[:8]}; run `mergec prepare`")
        store = Store.open(place, settings.store_key)
        header = store.header
        if fields.get("plan") != header.common:
            raise PartyError("the two parts of the store do not match; run `mergec prepare` again")
        if header.client != channel.name:
            raise PartyError(
                "this store belongs to another client; run `mergec prepare` as this one"
            )
        if header.weights != self._digest:
            raise PartyError(
                "the server's weights have changed since then; run `mergec prepare` again"
            )
        head = Head.read(fields.get("head"), channel.peer)
        if store.follow(head, read_tag(fields.get("tag"), channel.peer)):
            self._log.warning("skipped an answer", store=header.store, answer=head.used - 1)
        return store

    def _prepare(self, channel: Channel, joined: tuple[Channel, Origin], static: bytes) -> None:
        """Store what the dealer deals for the client's plan; `static`: seed of static masks."""
        settings, (dealer, origin) = self._settings, joined
        if settings.stores is None:
            raise PartyError("this server stores no randomness; it needs --stores")
        payload = channel.receive_any((Kind.PLAN,))[1]
        plan = Plan.read(channel.object(payload), self._program.manifest, "client")
        if reason := self._too_long(plan.prompt, plan.tokens):
            raise PartyError(f"the server stores no such answers: {reason}")
        dealer.send(Kind.PLAN, payload)
        whole_answer = patience(self._program, plan.steps(), settings.timeout)
        self._expect(whole_answer)
        header = Header(
            new_store(),
            ROLES[SERVER],
            self._program.manifest.program_hash,
            plan.answers,
            plan.prompt,
            plan.tokens,
            origin.salt.hex(),
            channel.name,
            self._digest,
            plan.drafts,
            plan.pace,
        )
        channel.send_json(Kind.ACCEPTED, store=header.store)
        try:
            with (
                self._pulse.working(),
                StoreWriter(
                    *(settings.stores, header, settings.store_key),
                    *(origin.seed, static, settings.store_bytes),
                ) as writer,
            ):
                done, told = 0, time.monotonic()
                while done < plan.answers:
                    kind, block = dealer.receive_any((Kind.BLOCK, Kind.MARK), MAX_BLOCK)
                    if kind is Kind.BLOCK:
                        writer.write(block)
                    else:
                        writer.end_answer()
                        self._expect(whole_answer)
                        done += 1
                    # Dealing one answer may take longer than the client's timeout.
                    if kind is Kind.MARK or time.monotonic() - told > _LOOK:
                        told = time.monotonic()
                        channel.send_json(Kind.STORED, answers=done, bytes=writer.size)
                writer.finish()
        except StoreError as error:
            self._log.error("cannot store", reason=str(error))
            raise PartyError("the server cannot store that much; see its log") from error
        dealer.send(Kind.END)
        dealer.close()
        try:
            channel.send_json(Kind.DONE, bytes=writer.size)
            channel.receive(Kind.END, limit=0)
        except PartyError:
            remove_store(settings.stores, header.store)  # the client may not have its part
            raise
        self._log.info("stored", store=header.store, answers=plan.answers, bytes=writer.size)

    def _place(self, channel: Channel) -> str:
        """Wait for a free session; returns the session's secret name."""
        self._parent.tell(kind="place", name=channel.name)
        while True:
            line = self._parent.line.fileno()
            ready = channel.readable(self._settings.idle_timeout, line)
            if line not in ready:
                if channel.fileno() in ready:
                    channel.receive_any(())  # a waiting client has nothing to send: this raises
                continue
            message, _ = self._parent.hear()
            if "refused" in message:
                wait = message["wait"]
                raise BusyError(f"{message['refused']}; try again in {wait} s", wait)
            if "session" in message:
                self._seated = True
                return str(message["session"])
            channel.send_json(Kind.QUEUED, position=message["position"])

    def _answers(
        self,
        session: MergecSession,
        channel: Channel,
        relay: Callable[[Kind, memoryview], None],
        watch: Callable[[], None],
        take: Callable[[], Schedule] | None = None,
        ahead: Callable[[memoryview], None] | None = None,
    ) -> None:
        """Serve answers until the client ends the session.

        relay: passes the client's requests on to the dealer. watch: called while the client is
        idle; raises if the session cannot go on. take: uses up the next answer of the store, after
        the client has; returns the steps that it was dealt for. ahead: has a step dealt that may
        come later, if that is offered.
        """
        kinds = (Kind.BEGIN, Kind.END, *((Kind.AHEAD,) if ahead is not None else ()))
        while True:
            self._await(channel, watch)
            kind, payload = channel.receive_any(kinds)
            if kind is Kind.END:
                return
            if ahead is not None and kind is Kind.AHEAD:
                ahead(payload)
                continue
            fields = channel.object(payload)
            if fields.get("salt") != session.salt.hex():
                raise PartyError(
                    "the client has another salt than this server, so the dealer told them "
                    "different ones; start another session, and check the dealer"
                )
            length = whole(fields, "length", 1, 1 << 30, channel.peer)
            tokens = whole(fields, "tokens", 1, 1 << 30, channel.peer)
            refusal = self._refusal(length, tokens)
            if refusal:
                channel.send_json(Kind.REFUSED, **refusal)
                continue
            channel.send_json(Kind.ACCEPTED)
            schedule = take() if take is not None else None
            self._answer(session, channel, relay, length, tokens, schedule)

    def _deal_ahead(
        self,
        session: MergecSession,
        channel: Channel,
        dealer: Channel,
        source: DealerReceiver,
        payload: memoryview,
    ) -> None:
        """Have a step dealt that the client may request next, unless there is no room for it."""
        new, past, draw, place, split, branches = read_step(payload, channel.peer)
        limits = self._settings.limits
        most = min(n for n in (limits.length, self._program.manifest.max_length, 1 << 20) if n)
        if new < 1 or past < 0 or new + past > most or split or branches != LINE:
            raise PartyError(f"the client wants {new} tokens after {past} dealt, out of turn")
        mine = ROLES[SERVER]
        held = 0 if past == session.present else session.ahead.size(mine)
        wait = math.ceil(self._parent.ask(kind="allowance")[0]["wait"])
        reason = ""
        if source.trouble:
            self._log.error("cannot hold what is dealt ahead", reason=source.trouble)
            reason = "it cannot hold more; see its log"
        elif wait:
            reason = f"{limits.rate} tokens a minute are used up; try again in {wait} s"
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
        self._charge(session)
        self._expect(patience(self._program, [(new, past)], self._settings.timeout))
        source.expect(step.dealt[mine])
        dealer.send(Kind.AHEAD, payload)
        channel.send_json(Kind.ACCEPTED)

    def _charge(self, session: MergecSession) -> None:
        """Count what was dealt ahead for nothing as tokens that the client used."""
        if session.ahead.wasted > self._charged:
            self._parent.tell(kind="wasted", tokens=session.ahead.wasted - self._charged)
            self._charged = session.ahead.wasted

    def _await(self, channel: Channel, watch: Callable[[], None]) -> None:
        """Wait for the client's next request. Between answers the session may be ended."""
        self._parent.idle = True
        deadline = time.monotonic() + self._settings.idle_timeout
        line = self._parent.line.fileno()
        while channel.fileno() not in (ready := channel.readable(_LOOK, line)):
            if line in ready:
                self._parent.hear()  # raises if the parent has ended; it sends nothing else
            watch()
            if time.monotonic() > deadline:
                raise PartyError("the session was idle for too long; start another one")
        self._parent.idle = False

    def _refusal(self, length: int, tokens: int) -> dict[str, Any]:
        """Why an answer of this length is refused, and when to retry; empty if it is allowed."""
        limits = self._settings.limits
        if reason := self._too_long(length, tokens):
            return {"reason": reason}
        wait = math.ceil(self._parent.ask(kind="allowance")[0]["wait"])
        if wait:
            used = f"{limits.rate} tokens a minute are used up; try again in {wait} s"
            return {"reason": used, "wait": wait}
        return {}

    def _too_long(self, length: int, tokens: int) -> str:
        """Why a prompt and an answer of these lengths are more than is allowed, or nothing."""
        limits = self._settings.limits
        most = [n for n in (limits.length, self._program.manifest.max_length) if n]
        if most and length + tokens > min(most):
            return f"prompt and answer may have {min(most)} tokens together"
        if limits.tokens and tokens > limits.tokens:
            return f"an answer may have {limits.tokens} tokens"
        return ""

    def _answer(
        self,
        session: MergecSession,
        channel: Channel,
        relay: Callable[[Kind, memoryview], None],
        length: int,
        tokens: int,
        schedule: Schedule | None = None,
    ) -> None:
        """Run the steps of one answer.

        length, tokens: most tokens of its prompt, and of the answer. schedule: of a stored answer,
        which bounds it.
        """
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
                relay(kind, payload)
                return
            new, past, draw, place, split, branches = read_step(payload, channel.peer)
            if place.conversation >= self._settings.limits.conversations:
                held = self._settings.limits.conversations
                raise PartyError(f"the client asks for more than {held} conversations at once")
            session.take_ahead(bytes(payload))
            self._charge(session)
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
            self._expect(patience(self._program, [(new, past)], self._settings.timeout))
            with self._pulse.working():
                relay(kind, payload)
                work = partial(session.step, new, past, draw=draw)
                report = measured(session, new, past, work)
            self._full = False
            self._parent.tell(kind="step", report=asdict(report))
