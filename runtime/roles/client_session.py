"""The client's side of a session with a server, which has one answer after another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mergec.runtime.core.context import ByteSource, ClientContext
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import LimitError, MergecError, PartyError, PromptError
from mergec.runtime.core.memory import release_freed_memory
from mergec.runtime.core.spec import CLIENT, ROLES
from mergec.runtime.engine.executor import Executor
from mergec.runtime.program.encoding import is_a
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.ranks.start import started
from mergec.runtime.roles.peers import Peers
from mergec.runtime.roles.preparer import Preparer
from mergec.runtime.roles.stored import Stored
from mergec.runtime.session.ahead import AheadPlan
from mergec.runtime.session.conversations import Conversations, Place
from mergec.runtime.session.generation import Token
from mergec.runtime.session.handshake import IDLE_TIMEOUT, SESSION, Origin, read_token
from mergec.runtime.session.hello import Hello
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.public_text import PublicText
from mergec.runtime.session.requests import Schedule
from mergec.runtime.session.steps import StepReport, measured
from mergec.runtime.session.stores.kept import Kept, is_name
from mergec.runtime.session.stores.reader import NoCorrections
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.dealer_link import ChannelBlockReader, DealerReceiver
from mergec.runtime.transport.frames import Kind, printable
from mergec.runtime.transport.spool import Spool


class ClientSession:
    """A session with a server. After its end it can be opened again, as another one.

    peers: the channels. steps: runs the steps; None while the session is not open.
    """

    def __init__(
        self,
        program: RoleProgram,
        peers: Peers,
        stored: Stored | None,
        public: Sequence[PublicText],
        *,
        device: str,
        ranks: int,
        keep: Path | None,
        overlap: bool,
        ahead: AheadPlan | None,
        on_notice: Callable[[str], object],
    ) -> None:
        """stored: where randomness comes from; None for the dealer. The rest as for `Connection`.

        public: the session's public texts.
        """
        self.peers = peers
        self.steps: MergecSession | None = None
        self.setup: StepReport | None = None
        self.conversations = Conversations(1)
        self._program, self._stored, self._public = program, stored, public
        self._device, self._count = device, ranks
        self._ranks = ExitStack()
        self._keep, self._overlap = keep, overlap
        self._ahead, self._on_notice = ahead, on_notice
        self._preparer: Preparer | None = None
        self._source: DealerReceiver | None = None

    def open(self) -> None:
        """Connect to server and dealer and receive the masked weights."""
        with self.guarded():
            self.steps = self._open()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Within this context the client is at work; what it raises ends the session."""
        try:
            with self.peers.working():
                yield
        except BaseException as error:
            self.abandon(error)
            raise

    def _open(self) -> MergecSession:
        hello = Hello.of(ROLES[CLIENT], self._program.manifest)
        stored, peers = self._stored, self.peers
        if stored is not None:
            channel, fields = self._admitted(hello, stored.wanted(hello))
            stored.agree(fields.get("head"), channel.peer)
            origin = stored.begin(read_token(fields, channel.peer))
            context = self._context(origin, NoCorrections(), constant_seed=stored.static)
            return self._set_up(channel, context, fields.get("masks"))
        wanted: dict[str, Any] = {"purpose": SESSION}
        if self._public:
            wanted["public"] = [text.digest for text in self._public]
        channel, fields = self._admitted(hello, wanted)
        dealer, origin = peers.join(hello, read_token(fields, channel.peer))
        blocks = ChannelBlockReader(dealer, IDLE_TIMEOUT)
        spool = Spool() if self._ahead is not None else None
        source = self._source = DealerReceiver(blocks, timeout=peers.timeout, spool=spool)
        context = self._context(origin, source)
        return self._set_up(channel, context, fields.get("masks"), source.skip)

    def _admitted(self, hello: Hello, wanted: dict[str, Any]) -> tuple[Channel, dict[str, Any]]:
        admitted = self.peers.admitted(hello, wanted)
        self.conversations = Conversations(self.peers.limits.get("conversations", 1))
        return admitted

    def _set_up(
        self,
        channel: Channel,
        context: ClientContext,
        masks: object,
        skip: Callable[[int], object] = lambda _: None,
    ) -> MergecSession:
        """Receive the masked weights, or load those kept if the server reuses its masks.

        masks: the name of these, from the server. skip: see `MergecSession`.
        """
        here, found = None, None
        if self._keep is not None and is_name(masks):
            here = Kept(self._keep, self._program.manifest.program_hash, str(masks))
            found = here.load()
        if masks is not None:
            channel.send_json(Kind.KEPT, kept=found is not None)
        kept, file = found or (None, None)
        context.ranks = self._ranks.enter_context(
            started(ROLES[CLIENT], self._count, self._device, file=file)
        )
        executor = Executor(self._program, context, channel, kept=kept)
        session = MergecSession(executor, lambda: channel.traffic, skip)
        session.overlaps = self._overlap

        def begin() -> None:
            session.setup()
            session.enter_public(self._public)

        self.setup = measured(session, 0, 0, begin)
        release_freed_memory()
        if here is not None and found is None:
            here.save(executor.hidden_weights())
        return session

    def _context(self, origin: Origin, source: ByteSource, **more: Any) -> ClientContext:
        arithmetic = self._program.manifest.arithmetic
        return ClientContext(
            origin.seed, source, self._device, salt=origin.salt, **arithmetic, **more
        )

    def begin(
        self, session: MergecSession, channel: Channel, length: int, tokens: int
    ) -> tuple[int, Schedule | None]:
        """Request an answer; returns how many prompt tokens its first step takes (0: all).

        For an answer from a store, also returns the steps that it was dealt for.
        """
        try:
            stored = self._stored
            if stored is not None:
                stored.check_lengths(length, tokens)
            self._ask(channel, session, length, tokens)
            if stored is None:
                return 0, None
            origin, corrections = stored.take(channel)
            session.use(self._context(origin, corrections), corrections.skip)
            return stored.prompt, stored.schedule()
        except PromptError:
            raise
        except BaseException as error:
            self.abandon(error)
            raise

    def _ask(self, channel: Channel, session: MergecSession, length: int, tokens: int) -> None:
        """Ask for an answer; raises PromptError if the server refuses it."""
        salt = session.salt.hex()
        channel.send_json(Kind.BEGIN, length=length, tokens=tokens, salt=salt)
        kind, fields = channel.receive_json(Kind.ACCEPTED, Kind.REFUSED)
        if kind is Kind.REFUSED:
            reason = printable(str(fields.get("reason", "")))
            told = f"the server refuses this prompt: {reason}"
            wait = fields.get("wait")
            raise LimitError(told, wait) if is_a(wait, int) else PromptError(told)

    def whole_steps(self, tokens: Iterator[Token]) -> Generator[Token, None, None]:
        """Pass tokens on. Stopping within a step ends the session; between steps it does not."""
        try:
            while True:
                with self.guarded():
                    token = next(tokens, None)
                if token is None:
                    return
                yield token
        finally:
            try:
                for channel in self.peers.channels:
                    channel.send(Kind.DONE)
            except PartyError as error:  # the answer is complete; the next one needs a new session
                self.abandon(error)

    @property
    def prepared(self) -> int:
        """Number of steps that are dealt ahead now."""
        return 0 if self._preparer is None else self._preparer.steps

    def deal_ahead(self, draw: Draw) -> None:
        """Have steps dealt from now on, until the next answer.

        draw: how its tokens will be chosen.
        """
        if self._ahead is None or self.steps is None or self._source is None:
            return
        if self._public and not self.steps.length:
            return  # the first prompt may begin with a text, or not
        if self._preparer is None:
            peers = self.peers
            self._preparer = Preparer(
                self._ahead, self.steps, peers.channels, self._source, peers.limits, peers.expect
            )
        self._preparer.start(draw)

    def stop_dealing(self) -> None:
        """Have no further steps dealt; a session that has ended meanwhile is forgotten."""
        preparer = self._preparer
        if preparer is None:
            return
        try:
            preparer.stop()
        except PartyError as error:
            self.abandon(error)
            self._on_notice(f"a new session begins, as the last one ended meanwhile: {error}")
        except BaseException as error:
            self.abandon(error)
            raise
        if preparer.told:
            self._on_notice(preparer.told)
            preparer.told = ""

    def dealt_ahead(self, place: Place, cached: int, length: int, draw: Draw) -> list[int]:
        """Tokens of the steps dealt ahead that the prompt of an answer is fed by."""
        preparer = self._preparer
        if preparer is None or not preparer.steps:
            return []
        sizes = preparer.fitting(place, cached, length, draw)
        if not sizes:
            steps = preparer.steps
            gone = (
                f"{steps} steps that were dealt ahead are" if steps > 1 else "a step dealt ahead is"
            )
            self._on_notice(
                f"{gone} thrown away: the prompt does not continue where they begin, or is faster "
                "as a whole"
            )
        return sizes

    def learn(self, report: StepReport, dealt: bool) -> None:
        """Note what a step took. dealt: whether it was dealt ahead."""
        if self._preparer is not None:
            self._preparer.learn(report.new, report.seconds, dealt)

    def abandon(self, error: BaseException) -> None:
        """End the session, and tell the peers why."""
        self.peers.fail(error)
        self._forget()

    def close(self) -> None:
        """End the session."""
        if self._preparer is not None:
            with suppress(MergecError):  # nobody asks this session for anything any more
                self._preparer.stop()
        self.peers.leave()
        self._forget()

    def _forget(self) -> None:
        self.steps = self._preparer = self._source = None
        self.peers.forget()
        self._ranks.close()
        if self._stored is not None:
            self._stored.release()
