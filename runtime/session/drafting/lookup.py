"""Drafts what followed the same tokens earlier in the prompt or the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from mergec.runtime.session.drafting.drafter import Drafter, Target
from mergec.runtime.session.drafting.tree import Tree, grown

LEAST, MOST = 2, 16
"""A draft needs that many tokens of the end to occur earlier; more than MOST are not compared."""

_LONGER = 4.0
"""How much more a place counts in a tree for each token more that it has in common."""


class Lookup(Drafter):
    """Finds the longest end of the tokens that occurs before, and drafts what followed it there.

    Of several places with equally long matches, the latest; a tree has what followed at the others,
    too, and at places with shorter matches. Good where an answer repeats its
    prompt: quotes, summaries, edits of code. Source: Saxena, "Prompt Lookup Decoding" (2023).
    """

    name = "lookup"

    @classmethod
    def open(cls, place: str, target: Target) -> Self:
        return cls()

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        ids = np.asarray(tokens, np.int64)
        found = list(_matches(ids))
        if not found:
            return []
        start = int(found[-1][-1]) + 1
        return [int(token) for token in ids[start : start + most]]

    def tree(self, tokens: Sequence[int], most: int) -> Tree:
        ids = np.asarray(tokens, np.int64)
        # Of places that count alike, the latest comes first.
        weights, weight = 1.0 + np.arange(len(ids)) / len(ids), 1.0
        places = ids[:0]
        for ends in _matches(ids):
            places = places if len(places) else ends
            weights[ends] *= weight
            weight = _LONGER

        def following(places: Any) -> Iterator[tuple[int, float, Any]]:
            ends, step = places
            at = ends + step
            inside = at < len(ids)
            total = weights[ends].sum()
            for token in np.unique(ids[at[inside]]):
                same = ends[inside][ids[at[inside]] == token]
                yield int(token), float(weights[same].sum() / total), (same, step + 1)

        return grown((places, 1), most, following)


def _matches(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Where the last LEAST tokens end earlier, then where one more does, and so on."""
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    for length in range(2, min(MOST, len(ids) - 1) + 1):
        ends = ends[ends >= length - 1]
        ends = ends[ids[ends - length + 1] == ids[-length]]
        if not len(ends):
            return
        if length >= LEAST:
            yield ends
