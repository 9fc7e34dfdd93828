"""Drafts what the model's own heads expect after the next token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from mergec.runtime.core.errors import PromptError
from mergec.runtime.session.drafting.drafter import Drafter, Target
from mergec.runtime.session.drafting.tree import Tree, grown

_SHARES = (0.6, 0.2, 0.1, 0.05)
"""How likely each candidate of a head is the right one: what a tree has follows from these alone,
so its shape says nothing."""


class Medusa(Drafter):
    """The most likely token of each head that the server's model has for later positions.

    A step reveals what the heads say at each position where it reveals the model's own logits, so
    drafts cost no step of their own. A line has of each head its best token alone; a tree, of the
    same shape in each step, combines the best ones. Source: Medusa (Cai et al., ICML 2024), with
    exact acceptance in place of its typical acceptance.
    """

    name = "medusa"

    def __init__(self) -> None:
        self._guessed: list[int] = []
        self._ranked: list[list[int]] = []

    @classmethod
    def open(cls, place: str, target: Target) -> Self:
        if not target.heads:
            raise PromptError(
                "this program has no heads that guess; train some with `mergec adapt --medusa 3` "
                "and compile that folder, or draft by lookup"
            )
        return cls()

    def guess(self, tokens: Sequence[int]) -> None:
        self._guessed = list(tokens)

    def rank(self, candidates: Sequence[Sequence[int]]) -> None:
        self._ranked = [list(tokens) for tokens in candidates]

    def tree(self, tokens: Sequence[int], most: int) -> Tree:
        def following(head: int) -> Iterator[tuple[int, float, int]]:
            ranked = self._ranked[head] if head < len(self._ranked) else []
            for token, share in zip(ranked, _SHARES, strict=False):
                yield token, share, head + 1

        return grown(0, most, following)

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        return self._guessed[:most]
