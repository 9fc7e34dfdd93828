"""Drafts that form a tree: several continuations, of which one step checks all."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

_DEEPER = 0.7
"""How likely a draft is right beside one that leads to it, where a tree grows."""


@dataclass
class Tree:
    """Drafts, each behind the one that it follows.

    tokens: the drafts. parents: for each, which draft it follows, counted from 1; 0 for the last
    token that is known. shares: for each, how likely it is right if its parent is and some draft
    behind that is; those of one parent add up to 1 at most.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    @classmethod
    def line(cls, tokens: Iterable[int]) -> Tree:
        """Drafts that follow each other."""
        drafted = list(tokens)
        return cls(drafted, list(range(len(drafted))), [1.0] * len(drafted))

    def first(self, count: int) -> Tree:
        """Its first drafts alone."""
        return Tree(self.tokens[:count], self.parents[:count], self.shares[:count])

    def behind(self, at: int) -> list[int]:
        """Which drafts follow draft `at`, counted from 1, or the last known token if it is 0."""
        return [number for number, parent in enumerate(self.parents, 1) if parent == at]

    def chances(self, acceptance: float) -> list[float]:
        """The probability that each draft is right.

        acceptance: that one of those behind a right draft is right, if there are any.
        """
        found = [1.0]
        for parent, share in zip(self.parents, self.shares, strict=True):
            found.append(found[parent] * acceptance * share)
        return found[1:]

    def right(self, tokens: Iterable[int]) -> list[int]:
        """Of the tokens that came, those that were drafted; at the end of them -1, if that is not
        because nothing was."""
        at, found = 0, list[int]()
        for token in tokens:
            behind = self.behind(at)
            at = next((n for n in behind if self.tokens[n - 1] == token), 0)
            if behind:
                found.append(token if at else -1)
            if not at:
                break
        return found


def merged(trees: Iterable[Tree], most: int) -> Tree:
    """One tree of up to `most` drafts of several trees, the likeliest first.

    A path that several have is in it once. At each place those that go on count alike.
    """

    def following(places: list[tuple[Tree, int]]) -> Iterator[tuple[int, float, Any]]:
        going = [(tree, behind) for tree, at in places if (behind := tree.behind(at))]
        found: dict[int, list[tuple[Tree, int]]] = {}
        for tree, behind in going:
            for number in behind:
                found.setdefault(tree.tokens[number - 1], []).append((tree, number))
        for token, there in found.items():
            yield token, sum(tree.shares[n - 1] for tree, n in there) / len(going), there

    return grown([(tree, 0) for tree in trees], most, following)


def grown(
    start: Any, most: int, following: Callable[[Any], Iterable[tuple[int, float, Any]]]
) -> Tree:
    """A tree of up to `most` drafts, the likeliest first.

    following: of a place, the different tokens that may follow with their shares and their places.
    start: the place of the last token that is known.
    """
    tree, order = Tree(), itertools.count()
    waiting: list[tuple[float, int, int, int, float, Any]] = []

    def offer(place: Any, parent: int, chance: float) -> None:
        for token, share, there in following(place):
            likely = chance * share * _DEEPER
            heapq.heappush(waiting, (-likely, next(order), parent, token, share, there))

    offer(start, 0, 1.0)
    while waiting and len(tree.tokens) < most:
        chance, _, parent, token, share, there = heapq.heappop(waiting)
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.shares.append(share)
        offer(there, len(tree.tokens), -chance)
    return tree
