"""What makes drafts: the interface, and the drafters by name."""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from typing import ClassVar, Self

import torch

from mergec.runtime.core.entry_points import load_class, offered, place_of
from mergec.runtime.core.errors import PromptError
from mergec.runtime.session.drafting.tree import Tree
from mergec.runtime.session.text import Text

ENTRY_POINTS = "mergec.drafters"
"""The group of entry points under which other packages offer drafters."""


@dataclass(frozen=True)
class Target:
    """The program that drafts are for.

    vocab_size: number of its tokens; 0 if unknown. text: its tokenizer, if it has one. heads: how
    many of the model's heads guess the tokens after the next one.
    """

    vocab_size: int
    text: Text | None
    heads: int = 0

    def tokens_of(self, place: str) -> str:
        """What identifies the program's tokens, to compare with those of `place`.

        Raises PromptError if the program has no tokenizer: token numbers alone do not say it.
        """
        if self.text is None:
            raise PromptError(
                f"{place} is for the tokens of one tokenizer, and this program has none to compare "
                "with; compile with the tokenizer, or draft by lookup"
            )
        return self.text.vocabulary_hash


class Drafter(ABC):
    """Guesses the tokens that follow; a guess costs nothing but time if it is wrong.

    A subclass in a file of this package, or an entry point of the group `mergec.drafters`, can be
    named in `speculate`: by its `name`, or `name:PLACE` if it reads something from a place. Several
    are joined by "+".

    name: what `speculate` calls it. place: what stands behind the colon, as in "DIR"; "" if nothing
    does.
    """

    name: ClassVar[str]
    place: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def open(cls, place: str, target: Target) -> Self:
        """A drafter for a program. Raises PromptError if it does not fit the program."""

    @abstractmethod
    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, the prompt's and the answer's; or none.

        Must be a function of its arguments, of what the drafter was opened with, and of what it was
        told of earlier steps: then a drafted token that is kept if the model chooses it leaves the
        answer's distribution as it is.
        """

    def tree(self, tokens: Sequence[int], most: int) -> Tree:
        """Up to `most` drafts in a tree, the likeliest first, as `draft` otherwise.

        Server and dealer see its shape, and which path of it is right. By default a line.
        """
        return Tree.line(self.draft(tokens, most))

    def expect(self, tokens: Sequence[int], rows: torch.Tensor) -> None:  # noqa: B027
        """Note what the model expects behind each token of a step, drafts included.

        tokens: the last ones of the step, behind each of which it gave a result. rows: logits
        [tokens, vocabulary]; or integers [tokens, 1], where the parties reveal tokens alone.
        """

    def rank(self, candidates: Sequence[Sequence[int]]) -> None:  # noqa: B027
        """Note the likeliest tokens by each of the model's heads, the first one first.

        Called with `guess`, which has the first one of each. There is one alone where the parties
        reveal tokens instead of logits.
        """

    def guess(self, tokens: Sequence[int]) -> None:  # noqa: B027
        """Note which tokens the model's heads expect after the next one, before `draft`.

        Called after each step; without tokens if the model has no heads. A drafter that has better
        ideas need not listen.
        """


@cache
def drafters() -> dict[str, type[Drafter]]:
    """Every drafter by name: those of this package, and those that other packages offer.

    Raises PromptError that names an entry point which cannot be used.
    """
    package = importlib.import_module("mergec.runtime.session.drafting")
    found: dict[str, type[Drafter]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        for kind in vars(loaded).values():
            if isinstance(kind, type) and issubclass(kind, Drafter) and kind is not Drafter:
                found[kind.name] = kind
    for point in offered(ENTRY_POINTS):
        kind = _loaded(point)
        if found.setdefault(kind.name, kind) is not kind:
            raise PromptError(f"there are two drafters {kind.name!r}; uninstall {point.value}")
    return found


def _loaded(point: EntryPoint) -> type[Drafter]:
    wanted = "a named subclass of mergec's Drafter"
    kind = load_class(point, Drafter, wanted, PromptError)  # type: ignore[type-abstract]
    if not hasattr(kind, "name"):
        raise PromptError(f"{place_of(point)} is not {wanted}")
    return kind


def read(speculate: str) -> list[tuple[type[Drafter], str]]:
    """The drafters that `speculate` names, joined by "+", and their places.

    Raises PromptError for any other text. A "+" joins only what a drafter's name follows, so that
    a place may contain one.
    """
    known = drafters()
    names = "|".join(map(re.escape, known))
    found = []
    for part in re.split(rf"\+(?=(?:{names})(?:[:+]|$))", speculate):
        name, colon, place = part.partition(":")
        kind = known.get(name)
        if kind is None or bool(place) != bool(kind.place) or (colon and not place):
            forms = [f"{k.name}:{k.place}" if k.place else k.name for k in known.values()]
            raise PromptError(
                f"speculate is {speculate!r}; it can be: {', '.join([*sorted(forms), 'none'])}, or "
                "several joined by +, as in lookup+medusa"
            )
        found.append((kind, place))
    return found
