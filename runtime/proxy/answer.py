"""An answer as a session generates it: pieces of its text, and what its tokens cost."""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter

from mergec.runtime.core.errors import PartyError
from mergec.runtime.program.program import PROMPT
from mergec.runtime.proxy.errors import place_of
from mergec.runtime.proxy.reader import Piece, Place, Reader
from mergec.runtime.proxy.replies import Usage
from mergec.runtime.proxy.sessions import Job
from mergec.runtime.session.steps import StepReport


@dataclass(frozen=True)
class Part:
    """The result of one token. The last part may have text without a token, and so no reports."""

    piece: Piece
    reports: tuple[StepReport, ...] = ()


class Answer:
    """Reads a job's tokens until one of them, or a stop string, ends the answer."""

    def __init__(
        self,
        job: Job,
        reader: Reader,
        length: int,
        stop: Container[int],
        log: Any,
        answered: Counter,
        drafts: bool = False,
    ) -> None:
        """length: length of the prompt, in tokens. stop: tokens that end an answer.

        answered: counter of answers, labelled by how they ended. drafts: whether to count drafted
        tokens.
        """
        self._job, self._reader, self._stop = job, reader, stop
        self._log, self._answered = log, answered
        self._length, self._count, self._cached = length, 0, 0
        self._drafts, self._drafted, self._accepted = drafts, 0, 0
        self._began = time.monotonic()
        self._over = self._closed = False
        self.finish = "length"
        """Why the answer ended, once it has ended."""

    @property
    def usage(self) -> Usage:
        wrong = self._drafted - self._accepted
        drafts = (self._accepted, wrong) if self._drafts else None
        return Usage(self._length, self._count, self._cached, drafts)

    async def next(self) -> Part | None:
        """The next part; None after the last. Raises the error that ended the answer early."""
        if self._over:
            return None
        token = await self._job.next()
        if token is None:
            return self._last(Piece())
        if not self._count:
            computed = sum(report.new for report in token.reports if report.phase == PROMPT)
            self._cached = max(self._length - computed, 0)
        self._count += 1
        self._drafted += sum(report.drafted for report in token.reports)
        self._accepted += sum(report.accepted for report in token.reports)
        if token.token in self._stop:
            self.finish = "stop"
            return self._last(Piece(), token.reports)
        piece = self._reader.token(token.token, token.logits)
        if self._reader.stopped:
            self.finish = "stop"
            return self._last(piece, token.reports)
        return Part(piece, token.reports)

    def _last(self, piece: Piece, reports: tuple[StepReport, ...] = ()) -> Part:
        self._over = True
        rest = self._reader.end()
        return Part(Piece(piece.text + rest.text, piece.places + rest.places), reports)

    async def all(self) -> Piece:
        """The whole text and its places at once. Raises the error that ended the answer early."""
        text: list[str] = []
        places: list[Place] = []
        while (part := await self.next()) is not None:
            text.append(part.piece.text)
            places += part.piece.places
        return Piece("".join(text), tuple(places))

    def close(self, error: BaseException | None = None) -> None:
        """Free the session, and log the outcome without any of the text."""
        if self._closed:
            return
        self._closed = True
        self._job.leave()
        how = self.finish if self._over else "failed" if isinstance(error, Exception) else "stopped"
        self._answered.labels(how).inc()
        told = {"prompt": self._length, "tokens": self._count}
        took = round(time.monotonic() - self._began, 3)
        if isinstance(error, PartyError):  # its message names roles and addresses, never a prompt
            self._log.warning("answer failed", reason=str(error), seconds=took, **told)
        elif isinstance(error, Exception):
            kind, at = type(error).__name__, place_of(error)
            self._log.warning("answer failed", kind=kind, at=at, seconds=took, **told)
        else:
            self._log.info("answered", how=how, seconds=took, **told)
