"""The server as a service: one bundle, several clients at once, each in a session of its own.

A session has masks of its own, so the client is sent W - B once per session: 8 bytes a weight. A
server with a key uses the same static masks B again, and a client may keep W - B. The server's
own memory for a session is its share of the caches, as all sessions share the weights.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergec.runtime.core.context import ByteSource, ServerContext
from mergec.runtime.core.errors import PartyError, PeerEndedError
from mergec.runtime.core.memory import release_freed_memory
from mergec.runtime.core.spec import CLIENT, FRACTIONAL_BITS, ROLES, SERVER, Vis
from mergec.runtime.engine.executor import Executor
from mergec.runtime.program.bundle import load_bundle
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.observe import PartyMetrics, open_log
from mergec.runtime.roles.service import (
    Desk,
    Parent,
    Service,
    Worker,
    played,
    prepare_to_fork,
    use_threads,
)
from mergec.runtime.session.generation import MergecSession, measured
from mergec.runtime.session.handshake import (
    IDLE_TIMEOUT,
    JOIN_TIMEOUT,
    PREPARE,
    SESSION,
    STORED,
    TIMEOUT,
    Plan,
    be_greeted,
    join_dealer,
    new_token,
    read_step,
    whole,
)
from mergec.runtime.session.hello import Hello
from mergec.runtime.session.stores.kept import digest_of, mask_seed, name_of
from mergec.runtime.session.stores.store import (
    Header,
    NoCorrections,
    Store,
    StoreError,
    StoreWriter,
    is_store,
    new_store,
    remove_store,
    remove_unfinished,
    stores_below,
)
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.channel import MAX_BLOCK, Channel, Kind
from mergec.runtime.transport.connect import Security, accept, listen
from mergec.runtime.transport.dealer_link import ChannelBlockReader, DealerReceiver

AHEAD_BYTES = 64 << 20
"""What a session takes from the dealer before it is used."""

_LOOK = 1.0
"""Seconds between two looks at the dealer while the client thinks, or signs of life to it."""


@dataclass(frozen=True)
class Limits:
    """What clients may ask of a server; 0 is no limit beyond the program's own.

    sessions: at once, of all clients. client_sessions: of one client, by the name in its
    certificate. queue: clients that may wait for a place. length: prompt and answer together.
    tokens: of an answer. rate: tokens of prompts and answers per client and minute.
    """

    sessions: int = 4
    client_sessions: int = 2
    queue: int = 16
    length: int = 0
    tokens: int = 0
    rate: int = 0


@dataclass(frozen=True)
class ServerSettings:
    """How a server is started. Times in seconds; grace: for answers to end at a shutdown."""

    bundle: Path
    listen: Address
    security: Security
    dealer: Address | None
    limits: Limits = Limits()
    device: str = "cpu"
    timeout: float = TIMEOUT
    idle_timeout: float = IDLE_TIMEOUT
    join_timeout: float = JOIN_TIMEOUT
    grace: float = 60.0
    metrics: Address | None = None
    threads: int = 1
    stores: Path | None = None
    """Where randomness dealt ahead is kept, if clients may have some; then there is a key, too."""
    store_key: bytes = b""
    """Of the stores, and of static masks that outlast a session."""
    store_bytes: int = 16 << 30
    """What one store may take on disk."""


def serve(settings: ServerSettings) -> bool:
    """Serve until SIGTERM or SIGINT; gives whether it was the latter."""
    prepare_to_fork()
    log = open_log(ROLES[SERVER])
    program = load_bundle(settings.bundle, ROLES[SERVER])
    encoded = Executor.take_weights(program)
    # Without a key nothing outlasts a session that would have to be told from other weights'.
    digest = digest_of(encoded) if settings.store_key else ""
    release_freed_memory()  # every session's process would copy it when it is used again
    metrics = PartyMetrics(ROLES[SERVER])
    if settings.stores is not None:
        found = stores_below(settings.stores)
        log.info("cleaned", unfinished_stores=remove_unfinished(settings.stores))
        for place in found:
            try:
                Store.open(place, settings.store_key)
            except StoreError as error:  # of one client: the others are served
                log.warning("a store that cannot be used", reason=str(error))
        metrics.watch(settings.stores)
    if settings.metrics is not None:
        metrics.serve(settings.metrics)
    with listen(settings.listen, settings.security) as listener:
        address = Address(*listener.getsockname()[:2])
        log.info("listening", address=str(address), program=program.manifest["program_hash"])

        def work(connection: socket.socket, parent: Parent) -> None:
            use_threads(settings.threads)
            _Session(settings, program, encoded, digest, connection, parent, log).play()

        desk = ServerDesk(settings.limits, metrics)
        interrupted = Service(listener, work, desk, settings.grace).run()
    log.info("stopped")
    return interrupted


class ServerDesk(Desk):
    """Who gets a place, who waits, and who has asked for too much."""

    def __init__(self, limits: Limits, metrics: PartyMetrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._running = metrics.gauge("sessions", "Sessions under way.")
        self._waiting = metrics.gauge("queue", "Clients that wait for a session.")
        self._ended = metrics.counter("sessions_ended", "Sessions, by how they ended.", "how")
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
                worker.tell({"refused": f"it is busy: {running} sessions, {waiting} clients wait"})
            self._count()
        elif message["kind"] == "allowance":
            worker.tell({"wait": self.allowance(worker.facts["name"]).wait()})
        elif message["kind"] == "step":
            self._metrics.step(message["report"])
            self.allowance(worker.facts["name"]).spend(message["report"]["new"])
        elif message["kind"] == "end":
            self._ended.labels(message["how"]).inc()

    def left(self, worker: Worker) -> None:
        self._seated.pop(worker.pid, None)
        if worker in self._queue:
            self._queue.remove(worker)
        self._seat()
        self._count()

    def _seat(self) -> None:
        """Give free places to whoever has waited longest and may have one."""
        for worker in list(self._queue):
            name = worker.facts["name"]
            taken = list(self._seated.values()).count(name)
            full = len(self._seated) >= self._limits.sessions
            if full or taken >= self._limits.client_sessions:
                continue
            self._queue.remove(worker)
            self._seated[worker.pid] = name
            worker.tell({"session": new_token()})
        for position, worker in enumerate(self._queue, 1):
            if worker.facts.get("position") != position:
                worker.facts["position"] = position
                worker.tell({"position": position})

    def allowance(self, name: str) -> Allowance:
        """A client's, kept across its sessions."""
        if len(self._allowances) > 10_000:
            self._allowances = {n: a for n, a in self._allowances.items() if a.wait()}
        return self._allowances.setdefault(name, Allowance(self._limits.rate))

    def _count(self) -> None:
        self._running.set(len(self._seated))
        self._waiting.set(len(self._queue))


class Allowance:
    """Tokens per minute: a bucket that a minute fills. An answer may overdraw it once."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._left = float(rate)
        self._when = time.monotonic()

    def spend(self, tokens: int) -> None:
        self._refill()
        self._left -= tokens

    def wait(self) -> float:
        """Seconds until the next answer may begin."""
        self._refill()
        return 0.0 if not self._rate or self._left >= 1 else (1 - self._left) * 60 / self._rate

    def _refill(self) -> None:
        now = time.monotonic()
        self._left = min(self._rate, self._left + (now - self._when) * self._rate / 60)
        self._when = now


class _Session:
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
    ) -> None:
        self._settings = settings
        self._program = program
        self._encoded, self._digest = encoded, digest
        self._connection = connection
        self._parent = parent
        self._log = log
        self._channel: Channel | None = None
        self._dealer: Channel | None = None
        self._seated = False

    def play(self) -> None:
        how = played(self._run, self._fail, lambda: self._log)
        if self._seated:
            self._parent.tell(kind="end", how=how)

    def _fail(self, reason: str) -> None:
        for channel in (self._channel, self._dealer):
            if channel is not None:
                channel.fail(reason)

    def _run(self) -> None:
        settings = self._settings
        self._parent.idle = True
        channel = self._channel = accept(
            self._connection, settings.security, (ROLES[CLIENT],), settings.timeout
        )
        hello = Hello.of(ROLES[SERVER], self._program.manifest)
        fields = be_greeted(channel, hello, (ROLES[CLIENT],))
        purpose = fields.get("purpose")
        self._log = self._log.bind(client=channel.name)
        store = self._find_store(fields, channel) if purpose == STORED else None
        token = self._place(channel)
        self._log = self._log.bind(session=token[:8])
        self._log.info("session began", purpose=str(purpose))
        masks = self._masks(purpose, store, channel.name)
        offered = {"masks": name_of(masks)} if masks else {}
        channel.send_json(Kind.ADMITTED, session=token, **asdict(settings.limits), **offered)
        self._parent.idle = False
        if store is not None:
            self._serve_stored(store, channel, masks)
        elif purpose == PREPARE:
            self._prepare(channel, self._join(hello, token))
        elif purpose == SESSION:
            told = {"masks": masks.hex()} if masks else {}
            self._serve_dealt(channel, self._join(hello, token, **told), masks)
        else:
            raise PartyError("the client wants something that is not offered here")
        channel.close()
        self._log.info("session ended")

    def _masks(self, purpose: object, store: Store | None, client: str) -> bytes | None:
        """Seed of static masks that stay for this client's later sessions, if there are such."""
        if any(spec.vis is Vis.SHARED for spec in self._program.constants):
            return None
        if store is not None:
            return store.seed
        if purpose != SESSION or not self._settings.store_key:
            return None
        program = self._program.manifest["program_hash"]
        return mask_seed(self._settings.store_key, program, client, self._digest)

    def _join(self, hello: Hello, token: str, **told: str) -> tuple[Channel, bytes]:
        settings = self._settings
        if settings.dealer is None:
            raise PartyError("this server knows no dealer; use stored randomness")
        dealer, seed = join_dealer(
            settings.dealer,
            hello,
            settings.security,
            token,
            settings.timeout,
            settings.join_timeout,
            **told,
        )
        self._dealer = dealer
        return dealer, seed

    def _serve_dealt(
        self, channel: Channel, joined: tuple[Channel, bytes], masks: bytes | None
    ) -> None:
        """A session whose randomness the dealer gives as it goes."""
        dealer, seed = joined
        blocks = ChannelBlockReader(dealer, self._settings.idle_timeout)
        source = DealerReceiver(blocks, AHEAD_BYTES, self._settings.timeout)
        session = self._begin(channel, self._context(seed, source, masks), masks)

        def watch() -> None:
            if source.ended:
                raise PeerEndedError("the dealer went away; see its own message")

        self._answers(session, channel, dealer.send, watch)
        dealer.send(Kind.END)
        dealer.close()

    def _serve_stored(self, store: Store, channel: Channel, masks: bytes | None) -> None:
        """A session whose randomness was dealt before."""
        session = self._begin(channel, self._context(store.seed, NoCorrections()), masks)

        def take(answer: int) -> None:
            session.use(self._context(*store.take(answer)))

        self._answers(session, channel, lambda *_: None, lambda: None, take)
        store.close()

    def _context(
        self, seed: bytes, source: ByteSource, masks: bytes | None = None
    ) -> ServerContext:
        fixed = self._program.manifest.get("fractional_bits", FRACTIONAL_BITS)
        return ServerContext(seed, source, self._settings.device, fixed, masks)

    def _begin(
        self, channel: Channel, context: ServerContext, masks: bytes | None
    ) -> MergecSession:
        """Hand the hidden weights over, unless these masks stay and the client has kept them."""
        kept = False
        if masks:
            kept = channel.receive_json(Kind.KEPT)[1].get("kept") is True
        executor = Executor(
            self._program, context, channel, self._encoded, kept={} if kept else None
        )
        session = MergecSession(executor, lambda: channel.traffic)
        session.setup()
        release_freed_memory()
        self._log.info("set up", kept=kept)
        return session

    def _find_store(self, fields: dict[str, Any], channel: Channel) -> Store:
        """The store that the client has the other part of."""
        settings, number = self._settings, fields.get("store")
        if settings.stores is None or not is_store(number):
            raise PartyError("no randomness is stored here; begin a session with the dealer")
        place = settings.stores / str(number)
        if not place.is_dir():
            raise PartyError(f"there is no store {str(number)[:8]} here; run `mergec prepare`")
        store = Store.open(place, settings.store_key)
        header = store.header
        if fields.get("plan") != header.common:
            raise PartyError("the two parts of the store do not belong together; prepare again")
        if header.client != channel.name:
            raise PartyError("this store belongs to another client; prepare one for this")
        if header.weights != self._digest:
            raise PartyError("the server has other weights than when it stored; prepare again")
        return store

    def _prepare(self, channel: Channel, joined: tuple[Channel, bytes]) -> None:
        """Store what the dealer gives for a plan of the client's."""
        settings, (dealer, seed) = self._settings, joined
        if settings.stores is None:
            raise PartyError("nothing can be stored here; the server needs --stores")
        payload = channel.receive_any((Kind.PLAN,))[1]
        plan = Plan.read(channel.object(payload), self._program.manifest["max_length"], "client")
        dealer.send(Kind.PLAN, payload)
        header = Header(
            new_store(),
            ROLES[SERVER],
            self._program.manifest["program_hash"],
            plan.answers,
            plan.prompt,
            plan.tokens,
            channel.name,
            self._digest,
        )
        channel.send_json(Kind.ACCEPTED, store=header.store)
        try:
            with StoreWriter(
                settings.stores, header, settings.store_key, seed, settings.store_bytes
            ) as writer:
                done, told = 0, time.monotonic()
                while done < plan.answers:
                    kind, block = dealer.receive_any((Kind.BLOCK, Kind.MARK), MAX_BLOCK)
                    if kind is Kind.BLOCK:
                        writer.write(block)
                    else:
                        writer.end_answer()
                        done += 1
                    # One answer may take longer than the client waits for a message.
                    if kind is Kind.MARK or time.monotonic() - told > _LOOK:
                        told = time.monotonic()
                        channel.send_json(Kind.STORED, answers=done, bytes=writer.size)
                writer.finish()
        except StoreError as error:
            self._log.error("cannot store", reason=str(error))
            raise PartyError("the server cannot store so much; see its log") from error
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
        """Wait for a place among the sessions; gives the session's secret name."""
        self._parent.tell(kind="place", name=channel.name)
        while True:
            line = self._parent.line.fileno()
            ready = channel.readable(self._settings.idle_timeout, line)
            if line not in ready:
                if channel.fileno() in ready:
                    channel.receive_any(())  # a client that waits has nothing to say
                continue
            message, _ = self._parent.hear()
            if "refused" in message:
                raise PartyError(f"{message['refused']}; try again later")
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
        take: Callable[[int], None] | None = None,
    ) -> None:
        """Give answers until the client ends the session.

        relay: hands the client's requests on. watch: called while nothing happens. take: uses up
        the answer of a store.
        """
        while True:
            self._await(channel, watch)
            kind, payload = channel.receive_any((Kind.BEGIN, Kind.END))
            if kind is Kind.END:
                return
            fields = channel.object(payload)
            length = whole(fields, "length", 1, 1 << 30, channel.peer)
            tokens = whole(fields, "tokens", 1, 1 << 30, channel.peer)
            refusal = self._refusal(length, tokens)
            if refusal:
                channel.send_json(Kind.REFUSED, **refusal)
                continue
            if take is not None:
                try:
                    take(whole(fields, "answer", 0, 1 << 30, channel.peer))
                except StoreError as error:
                    self._log.warning("not given", reason=str(error))
                    channel.send_json(Kind.REFUSED, reason="used up", used=True)
                    continue
            channel.send_json(Kind.ACCEPTED)
            self._answer(session, channel, relay, length + tokens)

    def _await(self, channel: Channel, watch: Callable[[], None]) -> None:
        """Let the client think. Between answers the session may be ended."""
        self._parent.idle = True
        deadline = time.monotonic() + self._settings.idle_timeout
        line = self._parent.line.fileno()
        while channel.fileno() not in (ready := channel.readable(_LOOK, line)):
            if line in ready:
                self._parent.hear()  # it says nothing to a session that runs, but may have ended
            watch()
            if time.monotonic() > deadline:
                raise PartyError("the session was idle for too long; begin another")
        self._parent.idle = False

    def _refusal(self, length: int, tokens: int) -> dict[str, Any]:
        """Why an answer of so many tokens cannot be given, if so; and when it can be."""
        limits = self._settings.limits
        most = [n for n in (limits.length, self._program.manifest["max_length"]) if n]
        if most and length + tokens > min(most):
            return {"reason": f"prompt and answer may have {min(most)} tokens together"}
        if limits.tokens and tokens > limits.tokens:
            return {"reason": f"an answer may have {limits.tokens} tokens"}
        wait = math.ceil(self._parent.ask(kind="allowance")[0]["wait"])
        if wait:
            used = f"{limits.rate} tokens a minute are used up; try again in {wait} s"
            return {"reason": used, "wait": wait}
        return {}

    def _answer(
        self,
        session: MergecSession,
        channel: Channel,
        relay: Callable[[Kind, memoryview], None],
        limit: int,
    ) -> None:
        """Take part in the steps of one answer; `limit`: of prompt and answer together."""
        done = 0
        while True:
            kind, payload = channel.receive_any((Kind.STEP, Kind.DONE))
            relay(kind, payload)
            if kind is Kind.DONE:
                return
            new, past, draw = read_step(payload, channel.peer)
            turn = past == (done if session.cached else 0) or new == 0
            if not session.allows(new, past) or not turn or new + past > limit:
                raise PartyError(f"the client asks for {new} tokens after {past}, out of turn")
            work = partial(session.step, new, past, draw=draw)
            report = measured(session, new, past, work)
            done += new
            self._parent.tell(kind="step", report=asdict(report))
