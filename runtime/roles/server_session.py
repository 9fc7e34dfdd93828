"""The server's side of one client's session, in a process of its own.

Each session has masks of its own, so the server sends W - B once per session: 8 bytes per weight. A
server with a key reuses its static masks B, and a client may keep W - B.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from mergec.runtime.core.context import ByteSource, ServerContext
from mergec.runtime.core.errors import BusyError, PartyError
from mergec.runtime.core.memory import release_freed_memory
from mergec.runtime.core.spec import CLIENT, ROLES, SERVER, Vis
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.engine.executor import Executor
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.ranks.start import started
from mergec.runtime.roles.allowance import Allowance
from mergec.runtime.roles.dealt_ahead import DealtAhead
from mergec.runtime.roles.server_answers import ServerAnswers
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
from mergec.runtime.session.requests import Plan, Schedule
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
"""Seconds between two messages to the client while the dealer deals what is stored."""


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

    def play(self) -> None:
        with closing(self._pulse), self._ranks:
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

        ahead = None
        if held:
            ahead = DealtAhead(
                *(self._settings, self._program, self._parent, self._log),
                *(session, channel, dealer, source),
            )
        answers = ServerAnswers(
            *(self._settings, self._program, self._parent, self._pulse),
            *(session, channel),
            dealt=(dealer, source),
            ahead=ahead,
        )
        try:
            answers.serve()
        finally:
            if ahead is not None:
                ahead.close()
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

        answers = ServerAnswers(
            *(self._settings, self._program, self._parent, self._pulse),
            *(session, channel),
            take=take,
        )
        answers.serve()
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
        allowance = Allowance(settings.limits, self._program.manifest, self._parent)
        if reason := allowance.too_long(plan.prompt, plan.tokens):
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
