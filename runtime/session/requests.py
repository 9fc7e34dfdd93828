"""What a client requests from the other roles: steps of an answer, and plans for later answers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, PartyError, PromptError
from mergec.runtime.engine.trees import LINE, Branches
from mergec.runtime.program.json_values import is_a
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.session.conversations import MOST_CONVERSATIONS, STILL, Place, public_source
from mergec.runtime.session.drafting.steady import Steady
from mergec.runtime.session.public_text import MOST_PREFIXES

if TYPE_CHECKING:
    from mergec.runtime.session.steps import Session

_STEP = struct.Struct("!7q")
_MARK = b"\xff"
"""Stands before the bytes that say how a step departs from a line; no block has this number."""

_MOST_BRANCHES = 1 << 9
"""Most bytes that say how a step departs from a line of tokens."""


def whole(fields: dict[str, Any], key: str, least: int, most: int, peer: str) -> int:
    """The number `key` in a peer's fields; raises PartyError unless it is an int within bounds."""
    value = fields.get(key)
    if not is_a(value, int) or not least <= value <= most:
        raise PartyError(f"the {peer} requests an invalid {key}: {str(value)[:20]}")
    return int(value)


def write_step(
    new: int,
    past: int,
    draw: Draw,
    place: Place = STILL,
    split: int = 0,
    branches: Branches = LINE,
) -> bytes:
    """Encode a step: `new` tokens after `past` ones, how the next token is chosen, and the caches.

    split: tokens of the first piece of a step in two pieces; 0 for a step as a whole. A byte
    follows for each block that is joined. branches: how the step departs from a line of tokens; if
    it does, a mark follows, the number of tokens that are kept, and a byte for each of these and
    for each parent. Raises struct.error if a number has more than 64 bits.
    """
    fixed = new, past, draw.units, draw.top_k, place.conversation, place.source, split
    more = bytes(place.joined)
    if branches != LINE:
        more += _MARK + bytes([len(branches.keep), *branches.keep, *branches.parents])
    return _STEP.pack(*fixed) + more


def read_step(
    payload: bytes | memoryview, peer: str
) -> tuple[int, int, Draw, Place, int, Branches]:
    """Decode a step: new and past tokens, the choice, the caches that it continues, tokens of its
    first piece, and how it departs from a line of tokens.

    The caller checks the lengths, and whether there are such caches. Raises PartyError if the
    numbers of the caches are out of bounds, or a tree is not of `new` tokens.
    """
    blocks, mark, more = bytes(payload[_STEP.size :]).partition(_MARK)
    readable = len(payload) >= _STEP.size and len(blocks) <= MOST_PREFIXES
    if not readable or len(more) > _MOST_BRANCHES or (mark and not _counted(more)):
        raise PartyError(f"the {peer} sent a step that cannot be read")
    new, past, units, top_k, conversation, source, split = _STEP.unpack(payload[: _STEP.size])
    bound, joined = MOST_CONVERSATIONS, tuple(blocks)
    if not (0 <= conversation < bound and -MOST_PREFIXES <= source < bound):
        raise PartyError(f"the {peer} requests caches {source} for conversation {conversation}")
    if joined and (
        source >= 0 or len({public_source(n) for n in joined} | {source}) <= len(joined)
    ):
        raise PartyError(f"the {peer} joins blocks {list(joined)} to caches {source}")
    branches = LINE
    if mark:
        branches = Branches(tuple(more[1 : 1 + more[0]]), tuple(more[1 + more[0] :]))
    place = Place(conversation, source, joined)
    return new, past, draw_of(units, top_k, peer), place, split, branches


def _counted(branches: bytes) -> bool:
    """Whether these bytes begin with a number of tokens that follow it."""
    return bool(branches) and branches[0] < len(branches)


def turn(session: Session, place: Place, peer: str) -> None:
    """Turn to the caches that a peer names; raises PartyError if there are none."""
    try:
        session.turn_to(place)
    except BundleError as error:
        raise PartyError(f"the {peer} requests what is not there: {error}") from error


def divide(session: Session, split: int, new: int, peer: str) -> None:
    """Let the next step run in the pieces that a peer names; raises PartyError if it cannot."""
    if not session.divides(split, new):
        raise PartyError(f"the {peer} requests a first piece of {split} of {new} tokens")
    session.split = split


def branch(
    session: Session, branches: Branches, new: int, past: int, split: int, peer: str
) -> None:
    """Let the next step depart like this from a line of tokens; raises PartyError if it cannot.

    Called behind `turn` and before `divide`. The step itself refuses a program that has no trees.
    """
    why = session.obstacle(new, past, branches)
    if not why and split and branches.parents:
        why = "a tree does not run in pieces"
    if why:
        raise PartyError(f"the {peer} requests what cannot be: {why}")
    session.branches = branches


def draw_of(units: int, top_k: int, peer: str) -> Draw:
    """The choice that a peer requests; raises PartyError if it is not a valid one."""
    try:
        return Draw(units, top_k)
    except PromptError as error:
        raise PartyError(f"the {peer} requests an invalid choice: {error}") from error


@dataclass(frozen=True)
class Plan:
    """The steps that randomness is precomputed for: a number of answers, all of the same lengths.

    The first step of an answer takes `prompt` tokens. Further steps take `tokens` more: by default
    one token each; with `pace`, as `Steady(drafts, pace)` says, with all extra steps that may come.
    """

    answers: int
    prompt: int
    tokens: int
    drafts: int = 0
    pace: int = 0

    @property
    def steady(self) -> Steady | None:
        """How the steps take several tokens each; None if they take one."""
        return Steady(self.drafts, self.pace) if self.pace else None

    def steps(self) -> list[tuple[int, int]]:
        """New and past tokens of every step of one answer."""
        first, end = (self.prompt, 0), self.prompt + self.tokens
        if self.steady is None:
            return [first, *((1, past) for past in range(self.prompt, end))]
        strides = self.steady.strides(self.prompt, end)
        return [first, *(step for stride in strides for step in stride.steps)]

    @classmethod
    def read(cls, fields: dict[str, Any], manifest: Manifest, peer: str) -> Plan:
        """Read a plan from a peer's fields; raises PartyError if the program cannot run it."""
        fields = {"drafts": 0, "pace": 0, **fields}
        limit = manifest.max_length or 1 << 20
        prompt = whole(fields, "prompt", 1, limit, peer)
        tokens = whole(fields, "tokens", 0, limit - prompt, peer)
        answers = whole(fields, "answers", 1, 1 << 20, peer)
        drafts = whole(fields, "drafts", 0, manifest.speculate_up_to, peer)
        pace = whole(fields, "pace", 0, 100 * (1 + drafts), peer)
        if bool(drafts) != bool(pace) or 0 < pace < 100:
            raise PartyError(f"the {peer} requests an invalid pace: {pace} with {drafts} drafts")
        return cls(answers, prompt, tokens, drafts, pace)

    def schedule(self) -> Schedule:
        """Holds the steps of one answer to this plan."""
        return Schedule(self.steps(), self.steady is not None)

    def fields(self) -> dict[str, int]:
        return asdict(self)


class Schedule:
    """Holds the steps of one answer to those that its randomness was dealt for.

    Every step takes the randomness of the step of its place, so any other step would combine
    masks and shares that do not belong together. An answer may end before the last step. With
    `branches`, a step may be left out if the next one begins with as many cached tokens, so that
    nothing of it would stay.
    """

    def __init__(self, steps: Sequence[tuple[int, int]], branches: bool = False) -> None:
        """branches: whether each step was dealt under masks of its own (`MergecSession.follow`),
        so that steps can be left out."""
        self._steps, self._next = steps, 0
        self.branches = branches

    @property
    def end(self) -> int:
        """Tokens in the caches after the last step."""
        return sum(self._steps[-1])

    def check(
        self,
        new: int,
        past: int,
        draw: Draw,
        peer: str,
        place: Place = STILL,
        split: int = 0,
        branches: Branches = LINE,
    ) -> tuple[int, Sequence[tuple[int, int]]]:
        """Check the next step, before anything is sent; raises PartyError if it is another one.

        Returns its number in the plan, and the steps before it that are left out.
        """
        left = self._steps[self._next :]
        due = left[0] if left else None
        may_come = left[:1]
        if self.branches:
            may_come = list(takewhile(lambda step: step[1] == past, left))
        alike = place == STILL and not split and branches == LINE
        if (new, past) in may_come and not draw.top_k and alike:
            left_out = left[: may_come.index((new, past))]
            number = self._next + len(left_out)
            self._next = number + 1
            return number, left_out
        choice = f" with top-k {draw.top_k}" if draw.top_k else ""
        dealt = "no further step" if due is None else f"{due[0]} tokens after {due[1]}"
        raise PartyError(
            f"the {peer} requests {new} tokens after {past}{choice}, but the store holds "
            f"randomness for {dealt}; keep to the plan that it was prepared for"
        )
