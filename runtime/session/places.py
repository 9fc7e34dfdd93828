"""Which caches of a session a client's prompt continues."""

from __future__ import annotations

from collections.abc import Sequence

from mergec.runtime.session.conversations import Conversations, Place, common_length, public_source
from mergec.runtime.session.public_blocks import place_of
from mergec.runtime.session.steps import Session


def cached_length(session: Session, ids: Sequence[int], combined: Sequence[int]) -> int:
    """How many tokens of a prompt are in the caches of earlier ones.

    combined: the public texts that the prompt combines.
    """
    begins = _begins(session, combined)
    marked = [*begins, *ids[len(begins) :]]
    kept = session.cached_tokens().values()
    return max((common_length(marked, tokens) for tokens in kept), default=0)


def choose_place(
    session: Session,
    conversations: Conversations,
    ids: Sequence[int],
    combined: Sequence[int],
    reuse: bool,
) -> tuple[Place, int]:
    """Which caches a prompt continues, and how many of its tokens are in them.

    combined: the public texts that the prompt combines. reuse: whether it may continue the caches
    of earlier ones.
    """
    kept = session.cached_tokens() if reuse else {}
    known = session.public_tokens()
    if not combined:
        return conversations.choose(ids, kept, known)
    begins = _begins(session, combined)
    prompt = [*begins, *ids[len(begins) :]]
    place, cached = conversations.choose(prompt, kept, [*known, begins])
    if place.source == public_source(len(known)):
        place = place_of(combined, place.conversation)
    return place, cached


def _begins(session: Session, combined: Sequence[int]) -> list[int]:
    """What stands for the tokens of a session's public texts where they are combined."""
    known = session.public_tokens() if combined else []
    return [token for n in combined for token in known[n]]
