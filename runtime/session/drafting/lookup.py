"""Drafts what followed the same tokens earlier in the prompt or the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from mergec.runtime.session.drafting.drafter import Drafter, Target
from mergec.runtime.session.drafting.tree import Tree, grown

LEAST, MOST = 2, 16
"""A draft needs that many tokens of the end to occur earlier; more than MOST are not compared."""

BEFORE, CHANGED = 8, 3
"""Where an end is new, up to CHANGED tokens are skipped, if BEFORE ahead of them occur earlier."""

_LONGER = 4.0
"""How much more a place counts in a tree for each token more that it has in common."""


class Lookup(Drafter):
    """Finds the longest end of the tokens that occurs before, and drafts what followed it there.

    Of several places with equally long matches, the latest; a tree has what followed at the others,
    too, and at places with shorter matches. If the end is new, as after a word that a quote or an
    edit has changed, it goes on in the earlier text behind as many tokens as were changed. Good
    where an answer repeats its prompt: quotes, summaries, edits of code. Source: Saxena, "Prompt
    Lookup Decoding" (2023), which has no such changes.
    """

    name = "lookup"

    @classmethod
    def open(cls, place: str, target: Target) -> Self:
        return cls()

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        ids = np.asarray(tokens, np.int64)
        found = list(_matches(ids))
        start = int(found[-1][-1]) + 1 if found else _behind_changes(ids)
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

        found = grown((places, 1), most, following)
        return found if found.tokens else Tree.line(self.draft(tokens, most))


def _behind_changes(ids: np.ndarray) -> int:
    """Where the tokens go on if the last ones, as few as possible, took the place of as many.

    The number of tokens if none before these occur earlier.
    """
    for changed in range(1, CHANGED + 1):
        known = ids[:-changed]
        if len(known) > BEFORE:
            windows = np.lib.stride_tricks.sliding_window_view(known[:-1], BEFORE)
            (starts,) = np.nonzero((windows == known[-BEFORE:]).all(-1))
            if len(starts):
                return int(starts[-1]) + BEFORE + changed
    return len(ids)


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
