"""Converts tokens to the text of an answer, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergec.runtime.session.text import Stream, Text


@dataclass(frozen=True)
class Scored:
    """A candidate token at a place, and the log of its probability there."""

    raw: bytes
    logprob: float

    @property
    def bytes(self) -> list[int]:
        return list(self.raw)

    @property
    def text(self) -> str:
        """The bytes as UTF-8. Those that are only part of a character are written as in `\\xe2`."""
        return self.raw.decode(errors="backslashreplace")

    @property
    def name(self) -> str:
        """The text; as in OpenAI's API, part of a character has `bytes:` before it."""
        try:
            return self.raw.decode()
        except UnicodeDecodeError:
            return f"bytes:{self.text}"


@dataclass(frozen=True)
class Place:
    """A place of an answer: its token, the best candidates, and the token's offset in the text."""

    chosen: Scored
    best: tuple[Scored, ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """Text that definitely belongs to the answer, and the places of the tokens in it."""

    text: str = ""
    places: tuple[Place, ...] = ()


class Reader:
    """Holds back text that may be the start of a stop string, and incomplete characters.

    best: number of candidates listed at each place; None omits places. after: the tokens of a
    prompt that the text continues; none if it stands alone.
    """

    def __init__(
        self,
        text: Text,
        stop: Sequence[str] = (),
        best: int | None = None,
        after: Sequence[int] = (),
    ) -> None:
        self._text, self._stop, self._best = text, tuple(stop), best
        self._stream = Stream(text, self._add, after)
        self._ids = list(after)
        self._held = ""
        self._given = 0
        self._places: list[Place] = []
        self.stopped = False
        """Whether a stop string was found; the answer ends before it."""

    def _add(self, text: str) -> None:
        self._held += text

    def token(self, token: int, logits: torch.Tensor | None = None) -> Piece:
        """Process a token and the logits [V] that it was chosen from; returns the new text."""
        if self._best is not None and logits is not None:
            self._places.append(self._place(token, logits, self._best))
        self._ids.append(token)
        self._stream.token(token)
        return self._give()

    def end(self) -> Piece:
        """The remaining text when no token follows."""
        if not self.stopped:
            self._stream.end()
        piece = self._give()
        if self.stopped:
            return piece
        rest = Piece(piece.text + self._held, (*piece.places, *self._places))
        self._held, self._places = "", []
        return rest

    def _give(self) -> Piece:
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            sure, self._held = self._held[: min(found)], ""
        else:
            kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - kept
            sure, self._held = self._held[:cut], self._held[cut:]
        self._given += len(sure)
        places = [place for place in self._places if place.offset < self._given]
        self._places = [] if self.stopped else self._places[len(places) :]
        return Piece(sure, tuple(places))

    def _place(self, token: int, logits: torch.Tensor, best: int) -> Place:
        """Log-probabilities of the model itself, independent of the temperature."""
        scores = torch.log_softmax(logits.detach().to("cpu", torch.float64).reshape(-1), -1)
        order = torch.sort(scores, descending=True, stable=True).indices[:best].tolist()

        def scored(token: int) -> Scored:
            return Scored(self._text.bytes_of(token, self._ids), float(scores[token]))

        # Offsets count the text decoded so far; a part of a character has the character's offset.
        offset = self._given + len(self._held)
        return Place(scored(token), tuple(scored(other) for other in order), offset)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
