"""Conversations of a session: which caches a step extends, and which ones it continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

MOST_CONVERSATIONS = 64
"""Most conversations whose caches one session can hold, whatever a server's limit is."""


class Place(NamedTuple):
    """Where a step's caches come from and go to.

    conversation: the number of the conversation whose caches the step extends. source: the
    conversation whose caches it continues, usually the same one; or a public text of the session,
    by `public_source`. joined: numbers of public blocks whose rows follow those of such a text.
    """

    conversation: int = 0
    source: int = 0
    joined: tuple[int, ...] = ()

    @classmethod
    def of(cls, conversation: int) -> Place:
        """Where a step continues a conversation's own caches."""
        return cls(conversation, conversation)


STILL = Place()
"""Where every step of a session with one conversation is."""


def common_length(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(mine), len(theirs)))


class Conversations:
    """At the client: which of a session's caches an answer continues, and which it gives up.

    A session has caches of at most `most` conversations, numbered from 0 on. They are given up in
    order of their last use.
    """

    def __init__(self, most: int) -> None:
        self._numbers = list(range(min(max(most, 1), MOST_CONVERSATIONS)))
        """The one that was used longest ago first."""

    def choose(
        self,
        prompt: Sequence[int],
        cached: Mapping[int, Sequence[int]],
        public: Sequence[Sequence[int]] = (),
    ) -> tuple[Place, int]:
        """Where an answer's caches come from and go to, and how many of its tokens are in them.

        cached: the tokens in each conversation's caches. public: those of the session's public
        texts, of which a prompt continues one that it begins with as a whole.

        The prompt continues the caches that have most of its beginning, all but its last token at
        most: each answer computes one token at least. They become longer in place if that drops
        less than it keeps; otherwise they stay, and a copy of their beginning is continued.
        """
        most = len(prompt) - 1
        sources = {n: min(common_length(prompt, t), most) for n, t in cached.items()}
        for number, tokens in enumerate(public):
            if len(tokens) <= most and common_length(prompt, tokens) == len(tokens):
                sources[public_source(number)] = len(tokens)
        source = max(sources, key=lambda n: (sources[n], n), default=0)
        common = sources.get(source, 0)
        if source >= 0 and common and (2 * common >= len(cached[source]) or self._is_only(source)):
            number = source
        else:
            unused = [n for n in self._numbers if not cached.get(n)]
            number = next(n for n in (*unused, *self._numbers) if n != source or not common)
        self._numbers.remove(number)
        self._numbers.append(number)
        return Place(number, source if common else number), common

    def _is_only(self, number: int) -> bool:
        return self._numbers == [number]


def public_source(number: int) -> int:
    """The source that stands for the public text of this number in a session, from 0 on."""
    return -1 - number


def block_marks(number: int, length: int) -> list[int]:
    """What stands for the tokens of a session's public block where a client compares beginnings.

    The same tokens outside of the block have other cache rows. No token is negative.
    """
    return [-1 - (number << 32 | n) for n in range(length)]
