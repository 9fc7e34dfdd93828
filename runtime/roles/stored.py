"""At the client: sessions whose randomness is in a store, and their answers."""

from __future__ import annotations

from typing import Any

from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import PartyError, PromptError
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.session.drafting import Speculation
from mergec.runtime.session.handshake import STORED, Origin
from mergec.runtime.session.hello import Hello
from mergec.runtime.session.requests import Schedule
from mergec.runtime.session.stores.format import StoreError
from mergec.runtime.session.stores.journal import Head, tag_of
from mergec.runtime.session.stores.reader import Corrections, Store, differing
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.frames import Kind


class Stored:
    """A client's part in what its store was prepared for: answers of a plan, in order."""

    def __init__(self, store: Store, program: RoleProgram) -> None:
        self._store, self._program = store, program
        self._tag = b""
        self.prompt = store.header.prompt
        """Tokens of a prompt that an answer's first step takes."""
        self.static = store.static
        """See `Store`."""

    def wanted(self, hello: Hello) -> dict[str, Any]:
        """What to ask the server for. Holds the store for a session, until `release`.

        Raises StoreError if it is for another program, or in use.
        """
        store = self._store
        if store.header.program != hello.program_hash:
            raise StoreError(f"{store.folder}: is for another program; run `mergec prepare` again")
        store.hold()
        return {
            "purpose": STORED,
            "store": store.header.store,
            "plan": store.header.common,
            **store.journal().fields(),
        }

    def agree(self, head: Any, peer: str) -> None:
        """Compare heads with the server's; raises PartyError if the two parts differ."""
        mine, theirs = self._store.journal().head, Head.read(head, peer)
        if mine != theirs:
            raise PartyError(differing(self._store.header.store, mine, theirs))

    def begin(self, token: str) -> Origin:
        """Begin the session with this secret name; returns where its setup's masks come from."""
        self._tag = tag_of(token)
        # Masks that the setup drew would be the same in each session from this store.
        return Origin(new_seed(), self._store.salt)

    def check_draw(self, draw: Draw) -> None:
        """Raise PromptError if stored answers cannot choose tokens like this."""
        if draw.top_k:
            raise PromptError(
                "stored randomness does not support top-k; set it to 0, or use the dealer"
            )

    def check_drafts(self, made: Speculation | None) -> None:
        """Raise PromptError unless the store was prepared for steps of these lengths."""
        planned = self._store.header.plan.steady
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
        wanted = None if made is None else made.steady(self._program.manifest)
        if planned is not None and wanted != planned:
            raise PromptError(
                f"this store was prepared for speculate_fixed={planned.fixed:g} and "
                f"speculate_tokens={planned.drafts}; give these, with what drafts, or another store"
            )

    def check_lengths(self, length: int, tokens: int) -> None:
        """Raise PromptError unless there is an answer left for so many tokens of a prompt, and
        `tokens` more."""
        header = self._store.header
        if self._program.encodes and length != header.prompt:
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

    def take(self, channel: Channel) -> tuple[Origin, Corrections]:
        """Use up the next answer, and tell the server; returns where its randomness comes from."""
        # This party first: see `Store` for what a crash between the two leaves.
        head, seed, corrections = self._store.take(self._tag)
        channel.send_json(Kind.TAKEN, **head.fields())
        return Origin(seed, self._store.salt), corrections

    def schedule(self) -> Schedule:
        """The steps that an answer was dealt for."""
        return self._store.header.plan.schedule()

    def release(self) -> None:
        """Let others hold the store."""
        self._store.release()
