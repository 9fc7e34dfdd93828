"""Drafts what the model itself thought likely behind the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch

from mergec.runtime.session.drafting.drafter import Drafter, Target
from mergec.runtime.session.drafting.tree import Tree, grown

_KEPT = 8
"""Most tokens that are noted behind one."""


class Recycle(Drafter):
    """The tokens that the model thought likely when a step last had the same token.

    A step reveals the model's logits behind each of its tokens, also behind drafts that were wrong.
    They are of no use for the answer so far, but say what may follow these tokens elsewhere. A line
    has the likeliest token behind each; a tree the likeliest ones, by the model's probabilities.
    Where the parties reveal tokens instead of logits, one is known behind each token. What was
    noted is forgotten with the first draft for a text that does not continue the last one.

    Source: Token Recycling (Luo et al., arXiv 2408.08696), which has one tree for all steps.
    """

    name = "recycle"

    def __init__(self) -> None:
        self._behind: dict[int, list[tuple[int, float]]] = {}
        self._text: list[int] = []

    @classmethod
    def open(cls, place: str, target: Target) -> Self:
        return cls()

    def expect(self, tokens: Sequence[int], rows: torch.Tensor) -> None:
        if rows.is_floating_point():
            shares, likely = rows.softmax(-1).topk(min(_KEPT, rows.shape[-1]))
        else:
            shares, likely = torch.ones(rows.shape), rows
        for token, *found in zip(tokens, likely.tolist(), shares.tolist(), strict=True):
            self._behind[token] = list(zip(*found, strict=True))

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        known, drafted = self._known(tokens), list[int]()
        last = tokens[-1]
        while len(drafted) < most and last in known:
            last = known[last][0][0]
            drafted.append(last)
        return drafted

    def tree(self, tokens: Sequence[int], most: int) -> Tree:
        known = self._known(tokens)

        def following(token: int) -> Iterator[tuple[int, float, int]]:
            return ((likely, share, likely) for likely, share in known.get(token, ()))

        return grown(tokens[-1], most, following)

    def _known(self, tokens: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
        """What may follow a token, if the text goes on; otherwise nothing."""
        if list(tokens[: len(self._text)]) != self._text:
            self._behind.clear()
        self._text = list(tokens)
        return self._behind
