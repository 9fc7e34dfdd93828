"""Steps of a decoder: what each role computes for one step, and the caches in between."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch

from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.core.spec import CLIENT, ROLES, Vis
from mergec.runtime.core.values import Held
from mergec.runtime.engine.plan import Plan
from mergec.runtime.engine.rehearsal import Rehearsal
from mergec.runtime.engine.trees import LINE, Branches, Trees, check_parents, is_path
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.program.program import (
    DECODE,
    FINISH,
    PADS,
    Phase,
    RoleProgram,
    is_text,
    phase_of,
)
from mergec.runtime.session.conversations import Place, public_source
from mergec.runtime.session.public_text import PublicText
from mergec.runtime.transport.traffic import Traffic

NO_TREES = "CrypTen's stock protocols check drafts in a line; draft without trees"

_GHOST = torch.empty(1, dtype=torch.int64, device="meta")
"""Stands for a number that only the client knows."""

_CANDIDATES = 4
"""Tokens of each head that may be drafted from."""


@dataclass(frozen=True)
class StepReport:
    """The cost of one step, as this party counted it: seconds, bytes and rounds.

    drafted, accepted: how many of the new tokens were drafts, and how many of these were right;
    only the client knows the second at once. repeated: how many a former step had taken already,
    where steps keep fewer tokens than are known (`drafting.steady`).
    """

    phase: str
    new: int
    past: int
    seconds: float = 0.0
    sent: int = 0
    received: int = 0
    rounds: int = 0
    offline_bytes: int = 0
    drafted: int = 0
    accepted: int = 0
    repeated: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of prompt or answer that the step led on: `new`, without the wrong drafts."""
        return self.new - self.drafted + self.accepted - self.repeated

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Grown:
    """The tree that the last step put into the caches, if it did.

    start: tokens before it. parents: see `Branches`; empty if there is no tree. ids: its tokens, at
    the client.
    """

    start: int = 0
    parents: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()

    @property
    def line(self) -> int:
        """How many of its first tokens follow each other."""
        turns = (n for n, parent in enumerate(self.parents) if parent != n)
        return 1 + next(turns, len(self.parents))

    def obstacle(self, past: int, keep: Sequence[int]) -> str:
        """Why a step cannot continue `past` tokens of the caches and keep these of the tree."""
        if keep:
            if not self.parents:
                return "tokens to keep were named, but the last step was no tree"
            if not is_path(keep, self.parents) or self.start + len(keep) != past:
                return f"tokens {list(keep)} of the last step are no path to token {past}"
        elif self.parents and past > self.start + self.line:
            return f"the first {past - self.start} tokens of the last step are no path"
        return ""


@dataclass
class Cached:
    """The caches that a conversation's steps left, or those of a public text.

    length: the number of tokens in them. tokens: these tokens, at the client; empty elsewhere.
    grown: the tree that is their end, if it is one.
    """

    caches: dict[str, Any]
    length: int
    tokens: list[int]
    grown: Grown = Grown()


class Session(ABC):
    """One role's executor, and the caches that its steps pass on."""

    def __init__(self, program: RoleProgram) -> None:
        self.program = program
        self.party = ROLES.index(program.role)
        tokens = [spec for spec in program.inputs if is_text(spec)]
        self.cache_specs = [spec for spec in program.inputs if spec.cache_output is not None]
        self._passed_on = self.cache_specs
        """The caches that a step leaves to the next one: also those of cross-attention."""
        if program.encodes:
            inputs = program.phase(DECODE).inputs
            self._passed_on = [spec for spec in inputs if spec.cache_output is not None]
        following = {spec.cache_output for spec in self._passed_on}
        logits = [name for name in program.outputs if name not in following]
        texts = 1 + program.encodes
        others = len(program.inputs) - len(self.cache_specs) - program.pads
        if len(tokens) != texts or len(logits) != 1 or others != texts:
            raise BundleError(
                "the program is not a decoder step of tokens and caches to logits; compile again"
            )
        self._caches: dict[str, Any] = {}
        self._hidden: list[Any] = []
        self.length = 0
        """Number of tokens in the caches; 0 without caches. Of an encoder-decoder: tokens of the
        source, and those of the answer that were generated and are in the caches."""
        self.pads = 0
        """At the client: how many tokens at the beginning of the text are padding."""
        self.source = 0
        """Number of tokens that the encoder of an encoder-decoder read."""
        self.rehearsal: Rehearsal | None = None
        """Runs steps on shapes, if this party compares its steps with such runs."""
        self.tokens: list[int] = []
        """The tokens in the caches, at the client; empty elsewhere. Of a tree that is their end,
        those first ones that follow each other."""
        self.branches = LINE
        """How the next step departs from tokens that follow each other."""
        self._grown = Grown()
        self.guesses = torch.zeros(program.manifest.medusa, 0, dtype=torch.int64)
        """At the client: the tokens that each of the model's heads thinks most likely, [heads, R],
        at the R positions at which the last step gave results."""
        self.candidates = torch.zeros(program.manifest.medusa, 0, 0, dtype=torch.int64)
        """The same with further tokens of each head behind it, [heads, R, K]; K is 1 if the parties
        reveal tokens alone."""
        self.split = 0
        """Tokens of the first piece of the next step, if it runs as two that overlap; else 0."""
        self._conversation = 0
        self._others: dict[int, Cached] = {}

    @property
    def conversation(self) -> int:
        """The number of the conversation whose caches the next step continues."""
        return self._conversation

    @property
    def cached(self) -> bool:
        """Whether a step continues from the one before; else each step needs all tokens again."""
        return bool(self.cache_specs)

    @abstractmethod
    def setup(self) -> None:
        """Do the work that is needed once, before the first step."""

    @abstractmethod
    def traffic(self) -> Traffic:
        """What this party has sent and received so far."""

    @cached_property
    def _trees(self) -> Trees:
        return Trees(Plan(self.program))

    @property
    def continues(self) -> bool:
        """Whether caches may be continued in another way than by the next token."""
        return self.cached and not self.program.phases

    def enter_public(self, texts: Sequence[PublicText]) -> None:
        """Put public texts into caches of their own, which steps can continue; after `setup`.

        Raises PromptError if the program cannot begin with public text.
        """
        if texts:
            raise PromptError("CrypTen's stock protocols take no public text; leave it out")

    def turn_to(self, place: Place) -> None:
        """Let the next steps continue the caches of `place.source`, as `place.conversation`'s own.

        If the source is another conversation, its own caches stay as they are: an entry is opened
        once, under one mask, however many conversations continue it. So do those of `place.joined`,
        whose rows follow the source's. Raises BundleError if there are no such caches, or if the
        program has none that can be continued like that.
        """
        if place == Place.of(self._conversation):
            return
        wanted = [place.source, *map(public_source, place.joined)]
        for number in wanted:
            if not self.continues or (number < 0 and number not in self._others):
                raise BundleError(f"there are no caches {number} that a step could continue")
        now = Cached(self._caches, self.length, self.tokens, self._grown)
        self._others[self._conversation] = now
        source, *joined = [self._others.get(number, Cached({}, 0, [])) for number in wanted]
        # Joined rows are copies: their number is bounded before they are made.
        length = source.length + sum(text.length for text in joined)
        if joined and length >= (self.program.manifest.max_length or 1 << 20):
            raise BundleError(f"caches of {length} tokens leave no room for a step")
        caches = source.caches
        if place.source != place.conversation:
            caches = {
                name: self._fork(cache, [text.caches[name] for text in joined])
                for name, cache in caches.items()
            }
        self._others.pop(place.conversation, None)
        self._conversation, self._caches = place.conversation, caches
        self.length = length
        self.tokens = [token for text in (source, *joined) for token in text.tokens]
        self._grown = source.grown

    def forget(self, length: int) -> None:
        """At the client: continue no more than the first `length` tokens of this conversation."""
        del self.tokens[length:]

    def cached_tokens(self) -> dict[int, list[int]]:
        """The tokens in the caches of each conversation, at the client."""
        others = {n: held.tokens for n, held in self._others.items() if n >= 0}
        return {**others, self._conversation: self.tokens}

    def public_tokens(self) -> list[list[int]]:
        """The tokens of each public text, at the client; marks in place of those of a block."""
        numbers = map(public_source, range(-min(self._others, default=0)))
        return [self._others[number].tokens for number in numbers]

    def _fork(self, cache: Any, joined: Sequence[Any]) -> Any:
        """The same cache, for a second continuation; with the rows of others behind its own."""
        return cache

    @abstractmethod
    def _start(self) -> dict[str, Any]:
        """Empty caches."""

    @abstractmethod
    def _execute(self, inputs: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Run the instructions that compute the outputs from the inputs."""

    @abstractmethod
    def _cut(self, cache: Any, dim: int, length: int) -> Any:
        """The first `length` entries of a cache, along its dimension `dim`."""

    def _pick(self, cache: Any, dim: int, start: int, keep: Sequence[int]) -> Any:
        """The first `start` entries of a cache, and those behind them that `keep` numbers."""
        raise BundleError(NO_TREES)

    def _line(self, phase: Phase, new: int, past: int) -> dict[str, Any]:
        """What the program computes from these lengths alone; see `Trees`."""
        raise BundleError(NO_TREES)

    def _sizes(self, new: int, past: int) -> dict[str, Any]:
        """Lengths of secret values in a step; see `Trees.sizes`."""
        if not self._trees.sizes:
            return {}
        return self._measuring.sizes(new, past)

    @cached_property
    def _measuring(self) -> Rehearsal:
        """What lengths are looked up in: it keeps what it has played."""
        return self.rehearsal or Rehearsal(self.program)

    @abstractmethod
    def _join(self, values: Sequence[Any]) -> Any:
        """Concatenate shares of n rows [1, 1, E] into one share of [1, n, E]."""

    def step(
        self, new: int, past: int, ids: Sequence[int] | None = None, draw: Draw | None = None
    ) -> torch.Tensor | None:
        """Run one step, at all roles together; only the client has `ids`, and gets a result.

        past: cached tokens that the step continues. Where more are cached, the caches are cut to
        `past` entries first, at every role; 0 empties them. What is computed in place of a dropped
        entry is opened under a fresh mask, since each role's stream of randomness goes on.

        The result is logits [V]. A program that reveals only the token returns the token [1]
        instead, chosen as `draw` says, by default the most likely one.

        The prompt of an encoder-decoder is its source: it takes the source through the encoder, and
        the token that every answer begins with through the decoder. Later steps continue the
        answer; `past` counts the source's tokens and those of the answer, and cannot be fewer than
        the source's.

        A program that resends its hidden state takes `ids` only in its first step, and the previous
        hidden state in the later ones; these steps return None. A last step of 0 new tokens returns
        the logits of all `past` steps before it, [past, V], by one run of the head.

        Raises BundleError if a step of these lengths cannot come now; see `allows`.
        """
        rows = self.rows(new, past, ids, draw)
        return rows if rows is None or new == 0 else rows[-1]

    def rows(
        self, new: int, past: int, ids: Sequence[int] | None = None, draw: Draw | None = None
    ) -> torch.Tensor | None:
        """Like `step`, with all rows that the program reveals: logits [R, V], or tokens [R, 1].

        R is `new` for a step that checks drafts: one of up to 1 + `Manifest.speculate_up_to` tokens
        after cached ones. It is 1 for any other, unless a user's pass keeps every position. Where
        the model has heads, `guesses` then holds their tokens at these positions.

        The tokens of such a step form a tree if `branches` says so: each has the position of its
        depth, and sees the caches and the tokens that lead to it alone. The step after it keeps a
        path of the tree: the caches of all roles keep its entries, each opened under the mask that
        it has, and drop the others.
        """
        if not self.allows(new, past):
            raise BundleError(
                f"a step of {new} tokens after {past} is out of turn; {self.length} are cached"
            )
        why = self.obstacle(new, past, self.branches)
        if why:
            self.branches = LINE
            raise BundleError(why)
        self._prepare(new, past, draw or Draw())
        branches, self.branches = self.branches, LINE
        phase = self.program.phase(phase_of(new, past))
        if phase.name == FINISH:
            return self._finish(phase)
        if past == 0:
            self._caches, self._hidden = self._start(), []
            self.source = new if self.program.encodes else 0
        elif past < self.length:
            self._roll_back(self.program.sizes(new, past, self.source)[1], branches.keep)
        if branches.keep:
            kept = [self._grown.ids[place] for place in branches.keep] if self._grown.ids else []
            self.tokens = [*self.tokens[: self._grown.start], *kept]
        outputs = self._compute(phase, new, past, ids, branches.parents)
        self._caches = {
            spec.name: outputs[spec.cache_output] for spec in self._passed_on if spec.cache_output
        }
        self.length = past + new if self.cached else 0
        fed = tuple(ids or ())
        self._grown = Grown()
        if branches.parents:
            self._grown = Grown(past, branches.parents, fed)
            fed = fed[: self._grown.line]
        self.tokens = [*self.tokens[:past], *fed] if self.continues else []
        result = outputs[phase.outputs[0]]
        if self.program.resends:
            self._hidden.append(result)
            return None
        return self._logits_at_client(result)

    def _compute(
        self,
        phase: Phase,
        new: int,
        past: int,
        ids: Sequence[int] | None,
        parents: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        """The outputs of a step that continues the caches as they are."""
        first = {phase.inputs[0].name: self._first(new, ids), **self._padding()}
        if parents:
            first |= self._trees.values(parents, past, partial(self._line, phase))
        if self.program.encodes and past == 0:
            begun = [self.program.manifest.answer_start]
            first[phase.inputs[1].name] = self._held(len(begun), begun)
        return self._execute({**first, **self._caches}, phase.outputs)

    def allows(self, new: int, past: int) -> bool:
        """Whether a step of these lengths can come now."""
        if new == 0:
            return self.program.resends and past == len(self._hidden) > 0
        if self.program.resends and past > 0:
            return new == 1 and past == self.length  # its hidden states cannot be rolled back
        if self.program.encodes and past < self.source:
            return new > 0 and past == 0
        return new > 0 and 0 <= past <= self.length

    def obstacle(self, new: int, past: int, branches: Branches) -> str:
        """Why the next step cannot depart like this from a line of tokens; empty if it can."""
        why = self._grown.obstacle(past, branches.keep)
        if why or not branches.parents:
            return why
        most = self.program.manifest.speculate_up_to
        if not self.continues or not past or new > 1 + most:
            return f"a tree of {new} tokens after {past} is not what this program checks"
        return check_parents(branches.parents, new)

    def _roll_back(self, past: int, keep: Sequence[int] = ()) -> None:
        """Drop all but the first `past` entries of every cache but those of a source.

        keep: the entries of the last step's tree to keep, if they are others; these end with the
        first `past` ones then.
        """
        moved = list(keep) != list(range(len(keep)))
        for spec in self.cache_specs:
            if "past" not in spec.shape:
                raise BundleError(f"{spec.name} has no length, so this program cannot roll back")
            dim, cache = spec.shape.index("past"), self._caches[spec.name]
            if moved:
                self._caches[spec.name] = self._pick(cache, dim, self._grown.start, keep)
            else:
                self._caches[spec.name] = self._cut(cache, dim, past)

    def _finish(self, phase: Phase) -> torch.Tensor | None:
        hidden, self._hidden = self._join(self._hidden), []
        outputs = self._execute({phase.inputs[0].name: hidden}, phase.outputs)
        return self._logits_at_client(outputs[phase.outputs[0]])

    def _first(self, new: int, ids: Sequence[int] | None) -> Any:
        """The first input of a step: tokens, or the hidden state of the previous step."""
        return self._hidden[-1] if self._hidden else self._held(new, ids)

    def _padding(self) -> dict[str, Held]:
        """The number of padded tokens, if the program takes it."""
        if not self.program.pads:
            return {}
        value = torch.tensor([self.pads]) if self.party == CLIENT else _GHOST
        return {PADS: Held(Vis.CLIENT, to_device(value, self._device, "input"))}

    @property
    def _device(self) -> torch.device:
        """Where this party computes."""
        return torch.device("cpu")

    def _held(self, new: int, ids: Sequence[int] | None) -> Held:
        """Tokens that the client knows."""
        if self.party == CLIENT:
            tokens = torch.tensor([list(ids or ())], dtype=torch.int64)
        else:
            tokens = torch.empty((1, new), dtype=torch.int64, device="meta")
        return Held(Vis.CLIENT, tokens)

    def _logits_at_client(self, logits: Any) -> torch.Tensor | None:
        if self.party != CLIENT:
            return None
        value: torch.Tensor = logits.value if isinstance(logits, Held) else logits
        manifest = self.program.manifest
        rows = value.reshape(-1, value.shape[-1] if manifest.reveals_logits else 1)
        if not manifest.medusa:
            return rows
        if len(rows) % (1 + manifest.medusa):
            raise BundleError("this program does not reveal what its heads say; compile it again")
        *heads, rows = rows.chunk(1 + manifest.medusa)
        most = min(_CANDIDATES, value.shape[-1]) if manifest.reveals_logits else 1
        ranked = [head.topk(most).indices if manifest.reveals_logits else head for head in heads]
        self.candidates = torch.stack(ranked).cpu()
        self.guesses = self.candidates[..., 0]
        return rows

    def divides(self, split: int, new: int) -> bool:
        """Whether a step of `new` tokens can run as pieces of `split` tokens and the rest."""
        return split == 0

    def divide(self, new: int, past: int) -> None:  # noqa: B027
        """At the client: choose whether the next step, of these lengths, runs in pieces."""

    def rehearse(self, new: int, past: int, draw: Draw | None = None) -> None:  # noqa: B027
        """Find out what a step of these lengths sends, before anybody is told of the step.

        Raises BundleError if that depends on more than the lengths. `step` does the same.
        """

    def _prepare(self, new: int, past: int, draw: Draw) -> None:  # noqa: B027
        """Note the step's lengths, and how its token is chosen if the parties choose it."""


def measured(session: Session, new: int, past: int, work: Callable[[], object]) -> StepReport:
    """Do `work` and report its cost as a step's."""
    before, began = session.traffic(), time.perf_counter()
    work()
    spent, seconds = session.traffic() - before, time.perf_counter() - began
    return StepReport(
        phase_of(new, past),
        new,
        past,
        seconds,
        spent.sent,
        spent.received,
        spent.rounds,
        spent.offline,
    )
