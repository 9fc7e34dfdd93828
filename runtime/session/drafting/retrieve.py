"""Drafts what follows the same tokens in a datastore of the client's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from mergec.runtime.core.errors import PromptError
from mergec.runtime.session.drafting.datastore import Datastore
from mergec.runtime.session.drafting.drafter import Drafter, Target
from mergec.runtime.session.drafting.tree import Tree, grown

LEAST, MOST = 2, 16
"""Fewest and most tokens of the end that are looked for."""

PLACES = 1024
"""Most occurrences whose continuations are weighed."""


class Retrieve(Drafter):
    """Finds the longest end of the tokens that occurs in a datastore, and drafts what follows it.

    Of the continuations of all occurrences, the most frequent token at each place. The datastore is
    the client's and is never sent. A tree has the most frequent continuations. Source: REST (He et
    al., arXiv 2311.08252).
    """

    name = "retrieve"
    place = "DIR"

    def __init__(self, datastore: Datastore) -> None:
        self._datastore = datastore

    @classmethod
    def open(cls, place: str, target: Target) -> Self:
        datastore = Datastore.load(Path(place))
        if datastore.vocabulary != target.tokens_of(place):
            raise PromptError(
                f"{place} was built for another tokenizer than this program's; build it again"
            )
        return cls(datastore)

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        positions = self._datastore.followers(tokens, LEAST, MOST, PLACES)
        drafted: list[int] = []
        while len(positions) and len(drafted) < most:
            found, inside = self._datastore.after(positions, len(drafted))
            if not inside.any():
                break
            values, counts = np.unique(found[inside], return_counts=True)
            best = int(values[counts.argmax()])
            drafted.append(best)
            positions = positions[inside & (found == best)]
        return drafted

    def tree(self, tokens: Sequence[int], most: int) -> Tree:
        def following(place: Any) -> Iterator[tuple[int, float, Any]]:
            positions, step = place
            if not len(positions):
                return
            found, inside = self._datastore.after(positions, step)
            values, counts = np.unique(found[inside], return_counts=True)
            for token, count in zip(values, counts, strict=True):
                same = positions[inside & (found == token)]
                yield int(token), float(count / len(positions)), (same, step + 1)

        return grown((self._datastore.followers(tokens, LEAST, MOST, PLACES), 0), most, following)
