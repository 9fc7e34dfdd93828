"""A whole session in one process, with a thread per role: for tests, measurements and simulation.

Shares, masks, messages and bytes are the real ones; only the separation is missing, so this
protects nothing. To run programs, use `runtime.roles.local` or the services.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from mergec.runtime.core.context import ClientContext, Context, DealerContext, ServerContext
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.network import Link
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER, Cost
from mergec.runtime.correlations.dpf import new_salt, salt_of
from mergec.runtime.correlations.prg import derive, new_seed
from mergec.runtime.engine.executor import Executor, StepRecord
from mergec.runtime.engine.trees import LINE, Branches
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.session.conversations import Place
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.public_blocks import compute_all
from mergec.runtime.session.public_text import PublicText
from mergec.runtime.session.requests import write_step
from mergec.runtime.transport.emulated import EmulatedLink
from mergec.runtime.transport.loopback import dealer_pair, link_pair
from mergec.runtime.transport.traffic import Exchange


class InProcessSession:
    """Sets up on entry; each `step` runs all three roles and returns the client's logits."""

    def __init__(
        self,
        programs: Mapping[str, RoleProgram],
        device: str | Sequence[str] = "cpu",
        seeds: tuple[bytes, bytes] | None = None,
        public: Sequence[Sequence[int]] = (),
        blocks: Sequence[Sequence[int]] = (),
        emulated: Link | None = None,
    ) -> None:
        """device: of all roles, or of client, server and dealer. seeds: the client's and the
        server's, to repeat a session word for word; else fresh.

        public: tokens of public texts, which `turn_to` can continue. blocks: those of public blocks
        behind the first of these texts, or behind nothing, which it can combine. emulated: a link
        to delay the parties' messages as.
        """
        places = (device,) * len(ROLES) if isinstance(device, str) else device
        client_seed, server_seed = seeds or (new_seed(), new_seed())
        salt = salt_of(client_seed) if seeds else new_salt()
        self._links = link_pair(timeout=600.0)
        streams = dealer_pair(timeout=600.0), dealer_pair(timeout=600.0)
        self._senders = streams[CLIENT][0], streams[SERVER][0]
        self._senders[CLIENT].keep_pace(self._senders[SERVER])
        sources = [source for _, source in streams]
        more = {**programs[ROLES[CLIENT]].manifest.arithmetic, "salt": salt}
        contexts: dict[int, Context] = {
            CLIENT: ClientContext(client_seed, sources[CLIENT], places[CLIENT], **more),
            SERVER: ServerContext(
                server_seed,
                sources[SERVER],
                places[SERVER],
                own_seed=seeds and _own(seeds[SERVER]),
                **more,
            ),
            DEALER: DealerContext(client_seed, server_seed, *self._senders, places[DEALER], **more),
        }
        links: list[Exchange | None] = [*self._links, None]
        if emulated is not None:
            links = [*(EmulatedLink(link, emulated) for link in self._links), None]
        self.executors = {
            party: Executor(programs[ROLES[party]], context, links[party])
            for party, context in contexts.items()
        }
        skips = {party: source.skip for party, source in enumerate(sources)}
        self._sessions = {
            party: MergecSession(
                executor,
                lambda link=self._links[CLIENT]: link.traffic,  # type: ignore[misc]
                skips.get(party, lambda _: None),
            )
            for party, executor in self.executors.items()
        }
        texts = [PublicText(len(tokens), tokens=tokens) for tokens in public]
        head = public[0] if public else ()
        texts += [PublicText(len(tokens), tokens=tokens, head=head) for tokens in blocks]
        self._public = {
            CLIENT: texts,
            SERVER: compute_all(programs[ROLES[SERVER]], texts),
            DEALER: [PublicText(text.length) for text in texts],
        }
        self._pool = ThreadPoolExecutor(max_workers=len(ROLES))

    def __enter__(self) -> InProcessSession:
        self._all(lambda party: self._sessions[party].setup())
        self._all(lambda party: self._sessions[party].enter_public(self._public[party]))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for link in self._links:
            link.close()
        for sender in self._senders:
            sender.abandon()
        self._pool.shutdown(wait=False)

    @property
    def pads(self) -> int:
        """How many tokens at the beginning of the text are padding; only the client is told."""
        return self._sessions[CLIENT].pads

    @pads.setter
    def pads(self, count: int) -> None:
        self._sessions[CLIENT].pads = count

    @property
    def record(self) -> StepRecord:
        """What the last step cost, as the server counted it, and the dealer its own bytes."""
        found, dealt = (self.executors[party].record for party in (SERVER, DEALER))
        return StepRecord(
            replace(found.total, offline=dealt.total.offline),
            {
                name: replace(cost, offline=dealt.by_instruction.get(name, Cost()).offline)
                for name, cost in found.by_instruction.items()
            },
        )

    def step(
        self, ids: Sequence[int], past: int, draw: Draw | None = None, split: int = 0
    ) -> torch.Tensor:
        """Logits [V], or the token [1], after `ids`, which follow `past` tokens of this session.

        With 0 past tokens the caches start empty. draw: how the token is chosen if only the token
        is revealed. split: tokens of the first of two pieces that overlap, if any. See
        `Session.step` for programs that resend their hidden state.
        """
        request = self._request(len(ids), past, draw)

        def run(party: int) -> torch.Tensor | None:
            session = self._sessions[party]
            if session.take_ahead(request) and party == DEALER:
                return None
            session.split = split
            return session.step(*_lengths(party, ids, past), draw)

        logits: torch.Tensor = self._all(run)[CLIENT]
        return logits

    def deal_ahead(self, new: int, past: int, draw: Draw | None = None) -> None:
        """Deal a step that may come later, or not; see `MergecSession.enter_ahead`."""
        request = self._request(new, past, draw)

        def run(party: int) -> None:
            session = self._sessions[party]
            here = Place.of(session.conversation)
            session.enter_ahead(request, new, past, draw or Draw(), here)
            if party == DEALER:
                session.step(new, past, draw=draw)

        self._all(run)

    def _request(self, new: int, past: int, draw: Draw | None) -> bytes:
        here = Place.of(self._sessions[CLIENT].conversation)
        return write_step(new, past, draw or Draw(), here)

    def rows(self, ids: Sequence[int], past: int, branches: Branches = LINE) -> torch.Tensor:
        """Like `step`, with all rows that the program reveals; see `Session.rows`.

        branches: how the tokens depart from a line.
        """

        def run(party: int) -> torch.Tensor | None:
            session = self._sessions[party]
            session.branches = branches
            return session.rows(*_lengths(party, ids, past))

        logits: torch.Tensor = self._all(run)[CLIENT]
        return logits

    def turn_to(self, place: Place) -> None:
        """Let the next steps continue other caches of this session; see `Session.turn_to`."""
        self._all(lambda party: self._sessions[party].turn_to(place))

    def _all(self, work: Callable[[int], Any]) -> list[Any]:
        def guarded(party: int) -> Any:
            try:
                result = work(party)
                if party == DEALER:
                    self._senders[CLIENT].flush()  # the server's keeps pace with it
                return result
            except BaseException:
                # The other two would wait for the next message of this one.
                for link in self._links:
                    link.close()
                for sender in self._senders:
                    sender.abandon()
                raise

        return list(self._pool.map(guarded, range(len(ROLES))))


def _own(seed: bytes) -> bytes:
    """A seed for the server's own noise, so that a session with given seeds can be repeated."""
    return derive(seed, "own")


def _lengths(party: int, ids: Sequence[int], past: int) -> tuple[int, int, Sequence[int] | None]:
    """Arguments of a role's step."""
    return len(ids), past, list(ids) if party == CLIENT else None
