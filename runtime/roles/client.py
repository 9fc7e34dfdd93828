"""The client's side of a session with a server, for any user interface."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from mergec.runtime.core.arguments import Arguments
from mergec.runtime.core.device import check_device
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import MergecError, PartyError, PromptError
from mergec.runtime.core.spec import CLIENT, ROLES
from mergec.runtime.program.bundle import TOKENIZER, expect, load_bundle
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.client_session import ClientSession
from mergec.runtime.roles.peers import Peers
from mergec.runtime.roles.prompts import Prompts
from mergec.runtime.roles.stored import Stored
from mergec.runtime.roles.storing import check_plan, store_answers
from mergec.runtime.session.ahead import AheadPlan
from mergec.runtime.session.conversations import STILL, Place
from mergec.runtime.session.drafting import Drafter, Speculation
from mergec.runtime.session.drafting.speculation import NONE, steady
from mergec.runtime.session.generation import Token, answer, check_prompt
from mergec.runtime.session.handshake import JOIN_TIMEOUT, TIMEOUT
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.padding import check_padding, padded_length
from mergec.runtime.session.places import cached_length, choose_place
from mergec.runtime.session.requests import Plan, write_step
from mergec.runtime.session.sampling import Sampling, draw_for
from mergec.runtime.session.steps import StepReport
from mergec.runtime.session.stores.reader import Store
from mergec.runtime.session.text import VOCABULARY, Text
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security
from mergec.runtime.transport.frames import Kind


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
        Raises PromptError if the program takes no padding, and for a number that is no such one.
        ranks: processes that share the masked weights and the caches; they end with the session.
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
        check = Arguments(PromptError)
        ranks = check.whole("ranks", ranks, 1)
        prompt_piece = check.whole("prompt_piece", prompt_piece, 0)
        pad_prompt = check.whole("pad_prompt", pad_prompt, 0)
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
        if self._prompts.public and store is not None:
            raise MergecError(
                "stored randomness does not support public text; use the dealer, or leave it out"
            )
        self._peers = Peers(
            self.program,
            server,
            dealer,
            security,
            timeout=timeout,
            join_timeout=join_timeout,
            on_wait=on_wait,
        )
        self._stored = None if store is None else Stored(store, self.program)
        self._session = ClientSession(
            self.program,
            self._peers,
            self._stored,
            self._prompts.public,
            device=device,
            ranks=ranks,
            keep=keep,
            overlap=overlap and store is None,
            ahead=ahead,
            on_notice=on_notice,
        )
        self._opened: tuple[tuple[object, ...], Speculation | None] | None = None
        # Where a prompt departs from an earlier one would tell lengths.
        self._reuse, self._piece = reuse and not pad_prompt, prompt_piece
        self._ahead = ahead
        self._draw = Draw()
        self._busy = threading.Lock()

    @property
    def setup(self) -> StepReport | None:
        """What opening the session cost."""
        return self._session.setup

    @property
    def limits(self) -> dict[str, int]:
        """What the server allows its clients; see `mergec.runtime.roles.settings.Limits`."""
        return self._peers.limits

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
        return self._session.steps is not None

    def open(self) -> None:
        """Connect to server and dealer and receive the masked weights, unless it is open."""
        if self.is_open:
            return
        self._session.open()
        self._session.deal_ahead(self._draw)

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
        check_plan(plan, self.program)
        with self._session.guarded():
            place, size = store_answers(self._peers, self.program, plan, root, key, on_answer)
        self.close()
        return place, size

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
        speculate: str | Drafter | Sequence[Drafter] | None = None,
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
        `lookup`, `medusa`, `recycle`, `retrieve:DIR`, `draft:DIR`, several joined by "+", one or
        several `Drafter`, or `none`; greedy answers and those of a seed stay the same, and server
        and dealer see how many drafts of each step were right. speculate_tokens: drafts of a step;
        None to choose as many as pay. speculate_fixed: tokens by which each step makes the caches
        longer in the mean, so that server and dealer do not see how many were right, only where too
        few were (`Steady`); None for as many as are right. speculate_extra: most extra steps that
        this takes where too few were right, before the answer goes on with one token a step; None
        for any number. speculate_tree: let drafts form a tree, whose shape and right path server
        and dealer see. blocks: the public blocks that the prompt combines, as in `encode`; a prompt
        of tokens begins with those of the text that they see and of these blocks. Closing the
        iterator ends the answer after the current step; the session stays open. Raises PromptError
        for a prompt, sampling or drafter that the program or the server does not allow, PartyError
        if a peer fails, and MergecError if the settings or the drafter need a package that is not
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
            self._session.stop_dealing()
            if not self.is_open:
                self._session.open()
            steps, channels = self._session.steps, self._peers.channels
            if steps is None:
                raise PartyError("the session is over; open a new one")
            if self._stored is not None:
                self._stored.check_draw(draw)
            length = self.padded(len(ids), max_tokens)
            first, schedule = self._session.begin(steps, channels[0], length, max_tokens)
            place, cached = self._place(steps, ids, combined)
            ahead = self._session.dealt_ahead(place, cached, len(ids), draw)
            steps.turn_to(place)
            taken = deque[bool]()

            def announce(new: int, past: int) -> None:
                nonlocal place, told
                told = past
                if schedule is not None:
                    number, left_out = schedule.check(
                        new, past, draw, ROLES[CLIENT], branches=steps.branches
                    )
                    if schedule.branches:
                        steps.follow(number, new, past, left_out)
                self._peers.expect([(new, past)])
                request = write_step(new, past, draw, place, steps.split, steps.branches)
                taken.append(steps.take_ahead(request))
                for channel in channels:
                    channel.send(Kind.STEP, request)
                place = Place.of(place.conversation)

            tokens = answer(
                steps,
                ids,
                max_tokens=max_tokens,
                sampling=sampling,
                stop=ending,
                announce=announce,
                first=first,
                cached=cached,
                piece=self._piece if self._stored is None else 0,
                ahead=ahead,
                fixed_length=fixed_length,
                speculation=speculation,
                planned=0 if schedule is None else schedule.end,
                pads=length - len(ids),
            )
            # Closed before anything else is sent: that ends the answer at the other roles.
            with closing(self._session.whole_steps(tokens)) as whole_steps:
                for token in whole_steps:
                    for report in token.reports:
                        self._session.learn(report, taken.popleft())
                    yield token
        finally:
            kept = self._session.steps
            if fixed_length and kept is not None:
                # Where the next prompt departs from these steps would tell the answer's length.
                kept.forget(len(ids))
            elif told >= 0 and speculation is not None and speculation.fixed and kept:
                # Or how many drafts of the last step were right.
                kept.forget(max(len(ids), told))
            self._draw = draw
            self._session.deal_ahead(draw)
            self._busy.release()

    @property
    def prepared(self) -> int:
        """Number of steps that are dealt ahead now."""
        return self._session.prepared

    def speculation(
        self,
        speculate: str | Drafter | Sequence[Drafter] | None = None,
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
        if not isinstance(name, str):
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
        if self._stored is not None:
            self._stored.check_drafts(made)
        if self._ahead is not None and made is not None:
            raise PromptError(
                "steps are dealt ahead for one token each; leave speculate out, or that"
            )
        return made

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
        steps = self._session.steps
        if steps is None or not self._reuse:
            return 0
        return cached_length(steps, prompt, self._prompts.combined(prompt, blocks))

    def _place(
        self, steps: MergecSession, ids: Sequence[int], combined: Sequence[int]
    ) -> tuple[Place, int]:
        """Which caches an answer continues, and how many of its tokens are in them.

        combined: the public texts that its prompt combines.
        """
        if not steps.continues or self._stored is not None:
            return STILL, 0  # what is stored was dealt for whole prompts
        return choose_place(steps, self._session.conversations, ids, combined, self._reuse)

    def close(self) -> None:
        """End the session."""
        self._session.close()
