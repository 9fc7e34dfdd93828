"""Steps whose randomness is dealt before it is known whether they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AheadPlan:
    """What a client has dealt while it waits for the next prompt.

    tokens: most steps of one token each. prompt: tokens of a step before them, for the beginning of
    the prompt; 0 or 1 for none. disk: most bytes that this party holds of them.
    """

    tokens: int
    prompt: int = 0
    disk: int = 2 << 30

    def steps(self, present: int, dealt: int, end: int, limit: int) -> list[tuple[int, int]]:
        """New and past tokens of the steps to have dealt now.

        present: tokens in the caches. dealt: steps that are dealt already, which end at `end`
        tokens. limit: most tokens of a session's texts.

        What is left over of earlier steps is continued, unless a prompt's first step comes before
        them: then all begins anew.
        """
        first = [self.prompt] if self.prompt > 1 else []
        if first:
            dealt, end = 0, present
        sizes = [*first, *[1] * (self.tokens - dealt)]
        found = []
        for new in sizes:
            if end + new > limit:
                break
            found.append((new, end))
            end += new
        return found


@dataclass(frozen=True)
class Prepared:
    """A step that was dealt ahead. request: as it will be requested. dealt: its bytes, by role.

    number: which of the session's such steps it is, and so which masks it has
    (`Context.branch`).
    """

    number: int
    request: bytes
    new: int
    past: int
    dealt: Mapping[str, int]


class Ahead:
    """At one role: the steps of a session that are dealt and have not come yet, in order.

    Each continues where the one before it ends, from the caches as they are. A step that comes is
    either the first of these, in all that is requested of it, or throws all of them away: they
    follow a text that is not to be. All roles hear the same requests, so they agree about it.
    """

    def __init__(self) -> None:
        self._steps: deque[Prepared] = deque()
        self._count = 0
        self.used = 0
        """Steps that came as they were dealt."""
        self.wasted = 0
        """Tokens of the steps that were thrown away."""

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> Sequence[Prepared]:
        return tuple(self._steps)

    def size(self, role: str) -> int:
        """Bytes that a role holds."""
        return sum(step.dealt[role] for step in self._steps)

    def add(self, request: bytes, new: int, past: int, dealt: Mapping[str, int]) -> Prepared:
        """Note a step that is dealt now, behind the others."""
        step = Prepared(self._count, request, new, past, dealt)
        self._count += 1
        self._steps.append(step)
        return step

    def take(self, request: bytes) -> Prepared | None:
        """The first step, if this requests it; None otherwise, also if there is none."""
        if not self._steps or self._steps[0].request != request:
            return None
        self.used += 1
        return self._steps.popleft()

    def clear(self) -> Sequence[Prepared]:
        """Throw all away; returns them."""
        gone, self._steps = tuple(self._steps), deque()
        self.wasted += sum(step.new for step in gone)
        return gone
