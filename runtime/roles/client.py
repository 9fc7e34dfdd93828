"""The client's side of a session with a server, for any user interface."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from mergec.runtime.core.context import ByteSource, ClientContext, constant_seed_of
from mergec.runtime.core.device import check_device
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BusyError, LimitError, MergecError, PartyError, PromptError
from mergec.runtime.core.memory import release_freed_memory
from mergec.runtime.core.spec import CLIENT, ROLES, SERVER
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.engine.executor import Executor
from mergec.runtime.program.bundle import TOKENIZER, expect, load_bundle
from mergec.runtime.program.encoding import is_a
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.ranks.start import started
from mergec.runtime.roles.preparer import Preparer
from mergec.runtime.roles.prompts import Prompts
from mergec.runtime.session.ahead import AheadPlan
from mergec.runtime.session.conversations import (
    STILL,
    Conversations,
    Place,
    common_length,
    public_source,
)
from mergec.runtime.session.drafting import Drafter, Speculation
from mergec.runtime.session.drafting.speculation import NONE, steady
from mergec.runtime.session.drafting.steady import Steady
from mergec.runtime.session.generation import Token, answer, check_prompt
from mergec.runtime.session.handshake import (
    IDLE_TIMEOUT,
    JOIN_TIMEOUT,
    PREPARE,
    SESSION,
    STORED,
    TIMEOUT,
    Origin,
    greet,
    join_dealer,
    read_token,
)
from mergec.runtime.session.hello import Hello
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.padding import check_padding, padded_length
from mergec.runtime.session.patience import patience, setup_patience
from mergec.runtime.session.public_blocks import place_of
from mergec.runtime.session.requests import Plan, Schedule, whole, write_step
from mergec.runtime.session.sampling import Sampling, draw_for
from mergec.runtime.session.steps import StepReport, measured
from mergec.runtime.session.stores.format import Header, StoreError, is_store
from mergec.runtime.session.stores.journal import Head, tag_of
from mergec.runtime.session.stores.kept import Kept, is_name
from mergec.runtime.session.stores.reader import NoCorrections, Store, differing
from mergec.runtime.session.stores.writer import StoreWriter
from mergec.runtime.session.text import VOCABULARY, Text
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.connect import Security, connect
from mergec.runtime.transport.dealer_link import ChannelBlockReader, DealerReceiver
from mergec.runtime.transport.frames import MAX_BLOCK, Kind, printable
from mergec.runtime.transport.pulse import BEAT, Pulse
from mergec.runtime.transport.spool import Spool

QUEUE_TIMEOUT = 3600.0
"""Seconds that a client waits for a session at a busy server."""


class Connection:
    """A session with a server: opened once, it answers any number of prompts.

    Opening costs 8 bytes of traffic and of memory per weight of the server. If the client keeps the
    masked weights and the server reuses its masks, the traffic is needed only once. A session
    generates one answer at a time. An error ends the session, and `open` starts a new one.
    """

    def __init__(
        self,
        bundle: str | Path | RoleProgram,
        *,
        server: Address,
        dealer: Address | None = None,
        store: Store | None = None,
        security: Security,
        device: str = "cpu",
        ranks: int = 1,
        timeout: float = TIMEOUT,
        join_timeout: float = JOIN_TIMEOUT,
        on_wait: Callable[[int], object] = lambda _: None,
        keep: Path | None = None,
        tokenizer: str | Path | None = None,
        expected: str | None = None,
        public_prefixes: Sequence[str | Sequence[int]] = (),
        public_chat: bool | None = None,
        public_blocks: Sequence[str | Sequence[int]] = (),
        reuse: bool = True,
        prompt_piece: int = 0,
        overlap: bool = True,
        ahead: AheadPlan | None = None,
        pad_prompt: int = 0,
        on_notice: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Prepare a connection; `open` connects.

        bundle: the client's bundle, or its folder. dealer or store: the source of randomness, one
        of the two; a store needs no dealer. on_wait: called with the position in the server's
        queue. keep: folder for masked weights, so that a server that has a key sends them once.
        tokenizer: a tokenizer of your own instead of the bundle's, as in `Text.given`. expected:
        the program's hash, if you know it; another program, tokenizer or chat template is refused.
        public_prefixes: what prompts may begin with and the server knows, too: texts, each a system
        message if the model has a chat template and the beginning of a prompt otherwise, or tokens.
        A prompt that begins with one of them takes no steps for it. public_chat: whether such texts
        are system messages; None if the model has a chat template. public_blocks: texts, or tokens,
        that the server knows, too, and that do not look at each other (`session.public_blocks`), so
        an answer's prompt can combine any of them; at most one of `public_prefixes` is the text
        that all of them see. Raises MergecError if neither or both of dealer and store are given or
        there is no such device, and PromptError if the program cannot begin with such a text.
        reuse: let a prompt continue the caches of an earlier one where it begins like it; otherwise
        each prompt is computed as a whole. prompt_piece: most tokens of a prompt that one step
        takes; 0 for any number. overlap: let the two halves of a step overlap, one computing while
        the other's messages travel, where that is faster by the cost model. ahead: what the dealer
        deals while the session waits for a prompt, so that the answer does not wait for it; raises
        MergecError with a store, or without reuse. on_notice: called with a line about that, at the
        beginning of an answer. pad_prompt: pad each prompt on the left to the next multiple of this
        number, or to as many tokens as fit, so that server and dealer learn no more of its length;
        0 for no padding. Then each prompt is computed as a whole, and none begins with public text.
        Raises PromptError if the program takes no padding. ranks: processes that share the masked
        weights and the caches; they end with the session.
        """
        if (dealer is None) == (store is None):
            raise MergecError(
                "randomness comes from either a dealer or a store; give exactly one of them"
            )
        if pad_prompt and (public_prefixes or public_blocks):
            raise PromptError(
                "padding would stand between the public text and the rest of a prompt, and move "
                "them apart; leave out either pad_prompt or the public text"
            )
        if pad_prompt and ahead is not None:
            raise MergecError(
                "steps are dealt ahead for prompts that continue caches, and with pad_prompt none "
                "does; leave one of them out"
            )
        if ahead is not None and (store is not None or not reuse):
            raise MergecError(
                "steps are dealt ahead for the next turn of a conversation, by the dealer; leave "
                "out either that, or the store and reuse=False"
            )
        check_device(device)
        if isinstance(bundle, RoleProgram):
            self.program, self.text = bundle, None
        else:
            self.program = load_bundle(bundle, ROLES[CLIENT])
            folder = Path(bundle) / TOKENIZER
            self.text = Text.load(folder) if (folder / VOCABULARY).is_file() else None
        if expected is not None:
            expect(self.program.manifest, expected, tokenizer is not None)
        if tokenizer is not None:
            self.text = Text.given(tokenizer)
        check_padding(pad_prompt, self.program.manifest)
        self._pad = pad_prompt
        self._prompts = Prompts(
            self.program, self.text, public_prefixes, public_blocks, public_chat
        )
        self._public = self._prompts.public
        if self._public and store is not None:
            raise MergecError(
                "stored randomness does not support public text; use the dealer, or leave it out"
            )
        self._server, self._dealer, self._store = server, dealer, store
        self._security = security
        self._device, self._count = device, ranks
        self._ranks = ExitStack()
        self._timeout, self._join_timeout = timeout, join_timeout
        self._on_wait = on_wait
        self._keep = keep
        self._masks: object = None
        self._tag = b""
        self._channels: list[Channel] = []
        self._pulse = Pulse()
        self._session: MergecSession | None = None
        self._opened: tuple[tuple[object, ...], Speculation | None] | None = None
        # Where a prompt departs from an earlier one would tell lengths.
        self._reuse, self._piece = reuse and not pad_prompt, prompt_piece
        self._overlap = overlap and store is None
        self._ahead, self._on_notice = ahead, on_notice
        self._preparer: Preparer | None = None
        self._source: DealerReceiver | None = None
        self._draw = Draw()
        self._conversations = Conversations(1)
        self._busy = threading.Lock()
        self.setup: StepReport | None = None
        """What opening the session cost."""
        self.limits: dict[str, int] = {}
        """What the server allows its clients; see `mergec.runtime.roles.settings.Limits`."""

    def __enter__(self) -> Connection:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        return self._session is not None

    def open(self) -> None:
        """Connect to server and dealer and receive the masked weights, unless it is open."""
        if self.is_open:
            return
        self._begin_session()
        self._deal_ahead()

    def _begin_session(self) -> None:
        try:
            with self._pulse.working():
                self._session = self._open()
        except BaseException as error:
            self._abandon(error)
            raise

    def _open(self) -> MergecSession:
        hello = Hello.of(ROLES[CLIENT], self.program.manifest)
        store = self._store
        wanted: dict[str, Any] = {"purpose": SESSION}
        if self._public:
            wanted["public"] = [text.digest for text in self._public]
        if store is not None:
            if store.header.program != hello.program_hash:
                raise StoreError(
                    f"{store.folder}: is for another program; run `mergec prepare` again"
                )
            store.hold()
            wanted = {
                "purpose": STORED,
                "store": store.header.store,
                "plan": store.header.common,
                **store.journal().fields(),
            }
        channel, token = self._admitted(hello, wanted)
        self._tag = tag_of(token)
        if store is not None:
            # Masks that the setup drew would be the same in each session from this store.
            fresh = Origin(new_seed(), store.salt)
            constants = {"constant_seed": store.static}
            return self._set_up(channel, self._context(fresh, NoCorrections(), **constants))
        dealer, origin = self._join(hello, token)
        blocks = ChannelBlockReader(dealer, IDLE_TIMEOUT)
        spool = Spool() if self._ahead is not None else None
        source = self._source = DealerReceiver(blocks, timeout=self._timeout, spool=spool)
        return self._set_up(channel, self._context(origin, source), source.skip)

    def _set_up(
        self,
        channel: Channel,
        context: ClientContext,
        skip: Callable[[int], object] = lambda _: None,
    ) -> MergecSession:
        """Receive the masked weights, or load those kept if the server reuses its masks.

        skip: see `MergecSession`.
        """
        here, found = None, None
        if self._keep is not None and is_name(self._masks):
            here = Kept(self._keep, self.program.manifest.program_hash, str(self._masks))
            found = here.load()
        if self._masks is not None:
            channel.send_json(Kind.KEPT, kept=found is not None)
        kept, file = found or (None, None)
        context.ranks = self._ranks.enter_context(
            started(ROLES[CLIENT], self._count, self._device, file=file)
        )
        executor = Executor(self.program, context, channel, kept=kept)
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
        arithmetic = self.program.manifest.arithmetic
        return ClientContext(
            origin.seed, source, self._device, salt=origin.salt, **arithmetic, **more
        )

    def _admitted(self, hello: Hello, wanted: dict[str, Any]) -> tuple[Channel, str]:
        """Connect to the server and wait for a session; returns its secret name, too."""
        channel = connect(
            self._server, ROLES[SERVER], self._security, self._timeout, self._join_timeout
        )
        self._channels.append(channel)
        greet(channel, hello, **wanted)
        self._pulse.beats.append(partial(channel.beat, BEAT / 2))
        channel.expect(QUEUE_TIMEOUT)
        kind, fields = Kind.QUEUED, dict[str, Any]()
        while kind is Kind.QUEUED:
            kind, fields = channel.receive_json(Kind.QUEUED, Kind.ADMITTED)
            if kind is Kind.QUEUED and is_a(fields.get("position"), int):
                self._on_wait(fields["position"])
        channel.expect(setup_patience(self.program, self._timeout))
        self.limits = {key: value for key, value in fields.items() if is_a(value, int)}
        self._conversations = Conversations(self.limits.get("conversations", 1))
        self._masks = fields.get("masks")
        if self._store is not None:
            mine, theirs = self._store.journal().head, Head.read(fields.get("head"), channel.peer)
            if mine != theirs:
                raise PartyError(differing(self._store.header.store, mine, theirs))
        return channel, read_token(fields, channel.peer)

    def _join(self, hello: Hello, token: str) -> tuple[Channel, Origin]:
        """Connect to the dealer; returns where this party's randomness comes from, too."""
        if self._dealer is None:
            raise MergecError("no dealer was given; give a dealer or a store")
        dealer, origin = join_dealer(
            self._dealer, hello, self._security, token, self._timeout, self._join_timeout
        )
        self._channels.append(dealer)
        self._pulse.beats.append(partial(dealer.beat, BEAT / 2))
        dealer.expect(setup_patience(self.program, self._timeout))
        return dealer, origin

    def prepare(
        self,
        plan: Plan,
        root: Path,
        key: bytes,
        on_answer: Callable[[int, int], object] = lambda _done, _size: None,
    ) -> tuple[Path, int]:
        """Precompute randomness with the dealer, and store it here and at the server.

        No session may be open. on_answer: called with the number of answers stored so far, and
        their size at both parties together, in bytes. Returns this party's folder below `root`, and
        the size at both parties together.
        """
        if self.is_open:
            raise MergecError("a session is open; close it before preparing")
        if self.program.resends:
            raise PromptError(
                "answers of a program that resends its hidden state cannot be precomputed, as its "
                "last step is as long as the answer; use the dealer"
            )
        if plan.steady is not None and plan.drafts > self.program.manifest.speculate_up_to:
            raise PromptError(
                f"this program checks up to {self.program.manifest.speculate_up_to} drafts a step, "
                f"not {plan.drafts}; prepare for fewer, or compile with a larger speculate_up_to"
            )
        try:
            with self._pulse.working():
                place, size = self._prepare(plan, root, key, on_answer)
        except BaseException as error:
            self._abandon(error)
            raise
        self.close()
        return place, size

    def _prepare(
        self, plan: Plan, root: Path, key: bytes, on_answer: Callable[[int, int], object]
    ) -> tuple[Path, int]:
        hello = Hello.of(ROLES[CLIENT], self.program.manifest)
        channel, token = self._admitted(hello, {"purpose": PREPARE})
        dealer, origin = self._join(hello, token)
        for other in self._channels:
            other.send_json(Kind.PLAN, **plan.fields())
        store = channel.receive_json(Kind.ACCEPTED)[1].get("store")
        if not isinstance(store, str) or not is_store(store):
            raise PartyError("the server does not name its store; run `mergec prepare` again")
        header = Header(
            store,
            ROLES[CLIENT],
            self.program.manifest.program_hash,
            plan.answers,
            plan.prompt,
            plan.tokens,
            origin.salt.hex(),
            drafts=plan.drafts,
            pace=plan.pace,
        )
        static = constant_seed_of(origin.seed)
        with StoreWriter(root, header, key, origin.seed, static) as writer:
            for done in range(1, plan.answers + 1):
                self._expect(plan.steps())
                while (received := _dealt(dealer, channel))[0] is Kind.BLOCK:
                    writer.write(received[1])
                writer.end_answer()
                stored = {"answers": 0}
                while whole(stored, "answers", 0, plan.answers, channel.peer) < done:
                    stored = channel.receive_json(Kind.STORED)[1]
                size = writer.size + whole(stored, "bytes", 0, 1 << 62, channel.peer)
                on_answer(done, size)
            channel.receive_json(Kind.DONE)
            writer.finish()
        return root / header.store, size

    def encode(
        self,
        prompt: str,
        chat: bool | None = None,
        public: str | None = None,
        blocks: Sequence[int] | None = None,
    ) -> list[int]:
        """Tokens of a text; see `Prompts.encode`."""
        return self._prompts.encode(prompt, chat, public, blocks)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], blocks: Sequence[int] | None = None
    ) -> list[int]:
        """Tokens of a conversation; see `Prompts.encode_chat`."""
        return self._prompts.encode_chat(messages, blocks)

    def check_chat(self) -> None:
        """Raise PromptError if the model has no chat template."""
        self._prompts.check_chat()

    @property
    def block_count(self) -> int:
        """The number of public blocks that an answer can combine."""
        return self._prompts.block_count

    def generate(
        self,
        prompt: Sequence[int] | str,
        *,
        max_tokens: int = 32,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
        fixed_length: bool = False,
        speculate: str | Drafter | None = None,
        speculate_tokens: int | None = None,
        speculate_fixed: float | None = None,
        speculate_extra: int | None = None,
        speculate_tree: bool = False,
        blocks: Sequence[int] | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the tokens after a prompt as they are computed, a stop token included.

        Opens a session if there is none. sampling: by default, and where it says nothing, the
        checkpoint's generation settings. stop: tokens that end the answer; by default those of the
        program. fixed_length: run `max_tokens` steps in any case, so that their number says nothing
        about the answer. speculate: what drafts the next tokens, so that a step can give several:
        `lookup`, `medusa`, `retrieve:DIR`, `draft:DIR`, a `Drafter`, or `none`; greedy answers and
        those of a seed stay the same, and server and dealer see how many drafts of each step were
        right. speculate_tokens: drafts of a step; None to choose as many as pay. speculate_fixed:
        tokens by which each step makes the caches longer in the mean, so that server and dealer do
        not see how many were right, only where too few were (`Steady`); None for as many as are
        right. speculate_extra: most extra steps that this takes where too few were right, before
        the answer goes on with one token a step; None for any number. speculate_tree: let drafts
        form a tree, whose shape and right path server and dealer see. blocks: the public blocks
        that the prompt combines, as in `encode`; a prompt of tokens begins with those of the text
        that they see and of these blocks. Closing the iterator ends the answer after the current
        step; the session stays open. Raises PromptError for a
        prompt, sampling or drafter that the program or the server does not allow, PartyError if a
        peer fails, and MergecError if the settings or the drafter need a package that is not
        installed.
        """
        ids = self.encode(prompt, blocks=blocks) if isinstance(prompt, str) else list(prompt)
        check_prompt(ids, max_tokens, self.program.manifest)
        combined = self._prompts.combined(ids, blocks)
        draw = draw_for(sampling or Sampling(), self.program.manifest)
        ending = self.program.manifest.stop_tokens if stop is None else stop
        speculation = self.speculation(
            speculate, speculate_tokens, speculate_fixed, speculate_extra, speculate_tree
        )
        if not self._busy.acquire(blocking=False):
            raise PartyError("this session is busy with another answer; open another session")
        told = -1
        try:
            self._stop_dealing()
            if not self.is_open:
                self._begin_session()
            session, channels = self._session, self._channels
            if session is None:
                raise PartyError("the session is over; open a new one")
            if self._store is not None and draw.top_k:
                raise PromptError(
                    "stored randomness does not support top-k; set it to 0, or use the dealer"
                )
            length = self.padded(len(ids), max_tokens)
            first, schedule = self._begin(session, channels[0], length, max_tokens)
            place, cached = self._place(session, ids, combined)
            ahead = self._dealt_ahead(place, cached, len(ids), draw)
            session.turn_to(place)
            taken = deque[bool]()

            def announce(new: int, past: int) -> None:
                nonlocal place, told
                told = past
                if schedule is not None:
                    number, left_out = schedule.check(
                        new, past, draw, ROLES[CLIENT], branches=session.branches
                    )
                    if schedule.branches:
                        session.follow(number, new, past, left_out)
                self._expect([(new, past)])
                request = write_step(new, past, draw, place, session.split, session.branches)
                taken.append(session.take_ahead(request))
                for channel in channels:
                    channel.send(Kind.STEP, request)
                place = Place.of(place.conversation)

            tokens = answer(
                session,
                ids,
                max_tokens=max_tokens,
                sampling=sampling,
                stop=ending,
                announce=announce,
                first=first,
                cached=cached,
                piece=self._piece if self._store is None else 0,
                ahead=ahead,
                fixed_length=fixed_length,
                speculation=speculation,
                planned=0 if schedule is None else schedule.end,
                pads=length - len(ids),
            )
            # Closed before anything else is sent: that ends the answer at the other roles.
            with closing(self._whole_steps(tokens)) as whole_steps:
                for token in whole_steps:
                    for report in token.reports:
                        dealt = taken.popleft()
                        if self._preparer is not None:
                            self._preparer.learn(report.new, report.seconds, dealt)
                    yield token
        finally:
            if fixed_length and self._session is not None:
                # Where the next prompt departs from these steps would tell the answer's length.
                self._session.forget(len(ids))
            elif told >= 0 and speculation is not None and speculation.fixed and self._session:
                # Or how many drafts of the last step were right.
                self._session.forget(max(len(ids), told))
            self._draw = draw
            self._deal_ahead()
            self._busy.release()

    @property
    def prepared(self) -> int:
        """Number of steps that are dealt ahead now."""
        return 0 if self._preparer is None else self._preparer.steps

    def _deal_ahead(self) -> None:
        """Have steps dealt from now on, until the next answer."""
        if self._ahead is None or self._session is None or self._source is None:
            return
        if self._public and not self._session.length:
            return  # the first prompt may begin with a text, or not
        if self._preparer is None:
            self._preparer = Preparer(
                self._ahead, self._session, self._channels, self._source, self.limits, self._expect
            )
        self._preparer.start(self._draw)

    def _stop_dealing(self) -> None:
        """Have no further steps dealt; a session that has ended meanwhile is forgotten."""
        preparer = self._preparer
        if preparer is None:
            return
        try:
            preparer.stop()
        except PartyError as error:
            self._abandon(error)
            self._on_notice(f"a new session begins, as the last one ended meanwhile: {error}")
        except BaseException as error:
            self._abandon(error)
            raise
        if preparer.told:
            self._on_notice(preparer.told)
            preparer.told = ""

    def _dealt_ahead(self, place: Place, cached: int, length: int, draw: Draw) -> list[int]:
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

    def speculation(
        self,
        speculate: str | Drafter | None = None,
        speculate_tokens: int | None = None,
        speculate_fixed: float | None = None,
        speculate_extra: int | None = None,
        speculate_tree: bool = False,
    ) -> Speculation | None:
        """What drafts for `generate`; opened once, so that it keeps what it has seen and loaded.

        Raises PromptError if there is no such drafter, if it does not fit the program or what the
        randomness is dealt for, or if the program cannot check drafts, and MergecError if a package
        is missing.
        """
        name = speculate or NONE
        how: dict[str, Any] = {
            "fixed": speculate_fixed, "extra": speculate_extra, "tree": speculate_tree,
        }  # fmt: skip
        if isinstance(name, Drafter):
            made: Speculation | None = Speculation(name, speculate_tokens, **how)
            steady(self.program.manifest, speculate_tokens, speculate_fixed)
        else:
            wanted = (name, speculate_tokens, *how.values())
            if self._opened is None or self._opened[0] != wanted:
                found = Speculation.open(
                    name, speculate_tokens, self.program.manifest, self.text, **how
                )
                self._opened = wanted, found
            made = self._opened[1]
        if self._store is not None:
            self._compare(made, self._store.header.plan.steady)
        if self._ahead is not None and made is not None:
            raise PromptError(
                "steps are dealt ahead for one token each; leave speculate out, or that"
            )
        return made

    def _compare(self, made: Speculation | None, planned: Steady | None) -> None:
        """Raise PromptError unless a store was prepared for steps of these lengths."""
        if planned is None and made is not None:
            raise PromptError(
                "stored randomness is dealt for one token a step; leave speculate out, use the "
                "dealer, or prepare a store with speculate_fixed"
            )
        if made is not None and made.extra is not None:
            raise PromptError(
                "stored randomness has all extra steps that may come, and none of one token; leave "
                "speculate_extra out, or use the dealer"
            )
        wanted = None if made is None else made.steady(self.program.manifest)
        if planned is not None and wanted != planned:
            raise PromptError(
                f"this store was prepared for speculate_fixed={planned.fixed:g} and "
                f"speculate_tokens={planned.drafts}; give these, with what drafts, or another store"
            )

    def padded(self, length: int, max_tokens: int = 1) -> int:
        """The tokens that a prompt of this length has with its padding, before so many more.

        Raises PromptError if prompt and answer are longer than program and server allow.
        """
        limits = (self.program.manifest.max_length, self.limits.get("length", 0))
        room = min((limit for limit in limits if limit), default=0)
        if self._pad and room and length + max_tokens > room:
            raise PromptError(
                f"the prompt has {length} tokens, which with {max_tokens} to generate is more than "
                f"the {room} that there is room for; shorten it, or ask for fewer"
            )
        return padded_length(length, self._pad, room and room - max_tokens)

    def cached(self, prompt: Sequence[int], blocks: Sequence[int] = ()) -> int:
        """How many tokens of a prompt need not be computed, as far as is known now.

        blocks: the public blocks that it combines, by number.
        """
        session = self._session
        if session is None or not self._reuse:
            return 0
        begins = begins_of(session, self._prompts.combined(prompt, blocks))
        marked = [*begins, *prompt[len(begins) :]]
        kept = session.cached_tokens().values()
        return max((common_length(marked, tokens) for tokens in kept), default=0)

    def _place(
        self, session: MergecSession, ids: Sequence[int], combined: Sequence[int] = ()
    ) -> tuple[Place, int]:
        """Which caches an answer continues, and how many of its tokens are in them.

        combined: the public texts that its prompt combines.
        """
        if not session.continues or self._store is not None:
            return STILL, 0  # what is stored was dealt for whole prompts
        kept = session.cached_tokens() if self._reuse else {}
        known = session.public_tokens()
        if not combined:
            return self._conversations.choose(ids, kept, known)
        begins = begins_of(session, combined)
        prompt = [*begins, *ids[len(begins) :]]
        place, cached = self._conversations.choose(prompt, kept, [*known, begins])
        if place.source == public_source(len(known)):
            place = place_of(combined, place.conversation)
        return place, cached

    def _begin(
        self, session: MergecSession, channel: Channel, length: int, tokens: int
    ) -> tuple[int, Schedule | None]:
        """Request an answer; returns how many prompt tokens its first step takes (0: all).

        For an answer from a store, also returns the steps that it was dealt for.
        """
        try:
            if self._store is None:
                self._ask(channel, session, length, tokens)
                return 0, None
            header = self._store.header
            if self.program.encodes and length != header.prompt:
                raise PromptError(
                    f"a stored answer takes a source of {header.prompt} tokens, which the encoder "
                    f"reads as a whole, and this one has {length}; prepare a store for as many, or "
                    "use the dealer"
                )
            room = header.tokens - (length - header.prompt) + 1
            if length < header.prompt or tokens > room:
                raise PromptError(
                    f"a stored answer takes a prompt of at least {header.prompt} tokens, and has "
                    f"room for {max(room, 0)} more after this one of {length}; prepare another "
                    "store, or use the dealer"
                )
            if not self._store.left():
                raise PromptError(f"{self._store.folder}: is used up; run `mergec prepare` again")
            self._ask(channel, session, length, tokens)
            # This party first: see `Store` for what a crash between the two leaves.
            head, seed, corrections = self._store.take(self._tag)
            channel.send_json(Kind.TAKEN, **head.fields())
            context = self._context(Origin(seed, self._store.salt), corrections)
            session.use(context, corrections.skip)
            return header.prompt, header.plan.schedule()
        except MergecError as error:
            if not isinstance(error, PromptError):
                self._abandon(error)
            raise
        except BaseException as error:
            self._abandon(error)
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

    def _whole_steps(self, tokens: Iterator[Token]) -> Generator[Token, None, None]:
        """Pass tokens on. Stopping within a step ends the session; between steps it does not."""
        try:
            while True:
                try:
                    with self._pulse.working():
                        token = next(tokens, None)
                except BaseException as error:
                    self._abandon(error)
                    raise
                if token is None:
                    return
                yield token
        finally:
            try:
                for channel in self._channels:
                    channel.send(Kind.DONE)
            except PartyError as error:  # the answer is complete; the next one needs a new session
                self._abandon(error)

    def _abandon(self, error: BaseException) -> None:
        # What stops the caller stops the session: nothing has failed.
        stopped = not isinstance(error, Exception)
        reason = "it was stopped" if stopped else "it cannot go on; see its error message"
        for channel in self._channels:
            wait = error.wait if isinstance(error, BusyError) else 0
            channel.fail(str(error) if isinstance(error, PartyError) else reason, stopped, wait)
        self._forget()

    def _expect(self, steps: Sequence[tuple[int, int]]) -> None:
        """Let heartbeats of the peers extend waits for as long as these steps may take."""
        for channel in self._channels:
            channel.expect(patience(self.program, steps, self._timeout))

    def close(self) -> None:
        """End the session."""
        if self._preparer is not None:
            with suppress(MergecError):  # nobody asks this session for anything any more
                self._preparer.stop()
        for channel in self._channels:
            with suppress(PartyError):  # the other side may have ended it before
                channel.send(Kind.END)
            channel.close()
        self._forget()

    def _forget(self) -> None:
        self._channels, self._session = [], None
        self._preparer = self._source = None
        self._ranks.close()
        self._pulse.close()
        self._pulse = Pulse()
        if self._store is not None:
            self._store.release()


def begins_of(session: MergecSession, combined: Sequence[int]) -> list[int]:
    """What stands for the tokens of a session's public texts where they are combined."""
    known = session.public_tokens() if combined else []
    return [token for n in combined for token in known[n]]


def _dealt(dealer: Channel, server: Channel) -> tuple[Kind, memoryview]:
    """The next block of an answer for a store, or the mark that ends it."""
    try:
        return dealer.receive_any((Kind.BLOCK, Kind.MARK), MAX_BLOCK)
    except PartyError:
        # The dealer ends when the server does, and the server says why: this raises.
        while True:
            server.receive_json(Kind.STORED)
