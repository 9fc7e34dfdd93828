"""Drafts what followed the same tokens earlier in the prompt or the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from mergec.runtime.session.drafting.drafter import Drafter, Target

LEAST, MOST = 2, 16
"""A draft needs that many tokens of the end to occur earlier; more than MOST are not compared."""


class Lookup(Drafter):
    """Finds the longest end of the tokens that occurs before, and drafts what followed it there.

    Of several places with equally long matches, the latest. Good where an answer repeats its
    prompt: quotes, summaries, edits of code. Source: Saxena, "Prompt Lookup Decoding" (2023).
    """

    name = "lookup"

    @classmethod
    def open(cls, place: str, target: Target) -> Self:
        return cls()

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        ids = np.asarray(tokens, np.int64)
        # Ends of matches of the last token, then of the last two, and so on.
        ends = np.flatnonzero(ids[:-1] == ids[-1])
        found = ends[:0]
        for length in range(2, min(MOST, len(ids) - 1) + 1):
            ends = ends[ends >= length - 1]
            ends = ends[ids[ends - length + 1] == ids[-length]]
            if not len(ends):
                break
            if length >= LEAST:
                found = ends
        if not len(found):
            return []
        start = int(found[-1]) + 1
        return [int(token) for token in ids[start : start + most]]
