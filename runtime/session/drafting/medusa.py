"""Drafts what the model's own heads expect after the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from mergec.runtime.core.errors import PromptError
from mergec.runtime.session.drafting.drafter import Drafter, Target


class Medusa(Drafter):
    """The most likely token of each head that the server's model has for later positions.

    A step reveals what the heads say at each position where it reveals the model's own logits, so
    drafts cost no step of their own. A chain: of each head its best token alone. Source: Medusa
    (Cai et al., ICML 2024), with exact acceptance in place of its typical acceptance.
    """

    name = "medusa"

    def __init__(self) -> None:
        self._guessed: list[int] = []

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

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        return self._guessed[:most]
