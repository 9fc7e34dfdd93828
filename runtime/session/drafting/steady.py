"""Steps whose lengths do not depend on which drafts are right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from mergec.runtime.core.errors import PromptError


class Stride(NamedTuple):
    """A step of `new` tokens after `past` ones, of which the caches keep the first `move`."""

    new: int
    past: int
    move: int

    @property
    def extra(self) -> tuple[int, int]:
        """New and past tokens of a step that may come before this one: of one token less.

        Nothing of it stays in the caches; it is there for what its results say.
        """
        return self.new - 1, self.past

    @property
    def steps(self) -> list[tuple[int, int]]:
        """New and past tokens of this step, behind all extra steps that may come before it: of the
        `move` tokens one is always known, and each extra step tells one at least."""
        return [*[self.extra] * (self.move - 1), (self.new, self.past)]


@dataclass(frozen=True)
class Steady:
    """Steps of 1 + `drafts` tokens, each of which makes the caches longer by the same number.

    The client knows more tokens than are in the caches. A step takes those that come next, and
    drafts behind them; what it says about the last known token and about right drafts makes the
    known ones more, and only the client learns how many more. Of each step the caches keep the
    tokens that are due, which are known before it begins: the next step drops the rest, right or
    not. Where too few are known, an extra step (`Stride.extra`) comes first, of one token less:
    these steps, and where an answer ends, are all that lengths tell. Where an answer may have only
    so many of them, it takes steps of one token (`singly`) instead of one more, to its end.

    drafts: most drafts of a step. pace: how many tokens the caches become longer by in a hundred
    steps; 100 to 100 * (1 + drafts).
    """

    drafts: int
    pace: int

    @classmethod
    def of(cls, fixed: float, drafts: int) -> Self:
        """Steps that keep `fixed` tokens in the mean, with two decimals; raises PromptError if that
        is not between 1 and 1 + drafts."""
        if not (math.isfinite(fixed) and 1 <= fixed <= 1 + drafts):
            raise PromptError(
                f"speculate_fixed is {fixed:g}; with {drafts} drafts a step it can be 1 to "
                f"{1 + drafts}"
            )
        return cls(drafts, round(100 * fixed))

    @property
    def fixed(self) -> float:
        """Tokens that a step keeps in the mean."""
        return self.pace / 100

    def strides(self, begin: int, end: int) -> Iterator[Stride]:
        """The steps of an answer whose first one comes after `begin` tokens, until the caches have
        `end` tokens: a function of lengths alone."""
        past, number = begin, 0
        while past < end:
            number += 1
            move = min(begin + self.pace * number // 100, end) - past
            yield Stride(min(1 + self.drafts, end - past), past, move)
            past += move


def singly(begin: int, end: int) -> Iterator[Stride]:
    """Steps of one token each, before which no extra one may come."""
    return (Stride(1, past, 1) for past in range(begin, end))
