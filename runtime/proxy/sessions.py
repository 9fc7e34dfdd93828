"""Sessions that stay open across requests, each driven by a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict
from typing import Any

from mergec.runtime.core.errors import BundleError, PartyError, PromptError
from mergec.runtime.proxy.errors import LIMITED, ApiError
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.observe import PartyMetrics
from mergec.runtime.roles.turnover import Turnover
from mergec.runtime.session.generation import Token
from mergec.runtime.session.sampling import Sampling, draw_for
from mergec.runtime.session.steps import StepReport


class Job:
    """A request in progress: a session's thread puts tokens in, the event loop takes them out."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Token | BaseException | None] = asyncio.Queue()
        self._left = threading.Event()
        self._future: Future[None] | None = None

    async def next(self) -> Token | None:
        """The next token; None after the last. Raises the error that ended the answer early."""
        event = await self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    @property
    def is_left(self) -> bool:
        return self._left.is_set()

    def leave(self) -> None:
        """Nobody waits for the answer any more: it ends after the step in progress."""
        self._left.set()
        if self._future is not None:
            self._future.cancel()

    def watch(self, future: Future[None]) -> None:
        """Report the end of the work in `future` as the end of this job."""
        self._future = future
        future.add_done_callback(self._ended)

    def put(self, event: Token | BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the service is shutting down
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _ended(self, future: Future[None]) -> None:
        if not future.cancelled():
            self.put(future.exception())


class Sessions:
    """Up to `most` sessions with a server, and requests that wait for one, in order of arrival.

    Opening a session costs 8 bytes of traffic and of memory per weight of the server. So a session
    stays open, and is reopened only if it ended: after too long an idle time, or by a failure.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        most: int,
        queue: int,
        metrics: PartyMetrics,
        drafting: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the first session.

        connect: creates a client that has no session yet. drafting: `speculate` and what goes with
        it (`Connection.speculation`) of every answer; by default none. Raises MergecError if
        opening fails, or if generation settings need a package that is not installed, and
        BundleError if the bundle has no tokenizer.
        """
        self._connect = connect
        first = connect()
        if first.text is None:
            raise BundleError("this bundle has no tokenizer; compile with one")
        draw_for(Sampling(), first.program.manifest)
        self._drafting = dict(drafting or {})
        self.drafts = first.speculation(**self._drafting) is not None
        """Whether answers are drafted."""
        self._first = first
        self.blocks = first.block_count
        """The number of public blocks that a prompt can combine."""
        first.open()
        self.program, self.text = first.program, first.text
        self.setup: StepReport | None = first.setup
        """Cost of opening the most recent session."""
        self.limits = first.limits
        """The server's limits."""
        self.most = min(most, self.limits.get("client_sessions") or most)
        self._turnover = Turnover(self.most)
        self._queue = queue
        self._idle = [first]
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self.most, "session")
        self._jobs: list[tuple[Job, Future[None]]] = []
        self._metrics = metrics
        metrics.gauge("requests", "Requests that are answered or wait.").set_function(
            lambda: self.busy
        )
        self.answered = metrics.counter("answers", "Answers, by how they ended.", "how")

    @property
    def busy(self) -> int:
        """Requests that are being answered or wait. May be called from any thread."""
        return sum(not future.done() for _, future in list(self._jobs))

    def encode(self, prompt: str, blocks: Sequence[int] = ()) -> list[int]:
        """Tokens of a text; blocks: the public blocks that come before it, by number."""
        if not blocks:
            return self.text.encode(prompt)
        return self._first.encode(prompt, chat=False, blocks=blocks)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], blocks: Sequence[int] = ()
    ) -> list[int]:
        """Tokens of a conversation; likewise. Raises PromptError as `Connection.encode_chat`."""
        return self._first.encode_chat(messages, blocks)

    def padded(self, length: int) -> int:
        """The tokens that a prompt of this length has with its padding, if it leaves any room.

        What a request may ask for follows from it, as that is told to the server.
        """
        try:
            return self._first.padded(length)
        except PromptError:
            return length

    def ask(self, prompt: Sequence[int], blocks: Sequence[int] = (), **options: Any) -> Job:
        """Answer a prompt as soon as a session is free.

        blocks: the public blocks that it combines, by number. options: those of
        Connection.generate.

        Raises ApiError 429 if the queue is full.
        """
        self._jobs = [(job, future) for job, future in self._jobs if not future.done()]
        waiting = max(self.busy - self.most, 0)
        if self.busy >= self.most and waiting >= self._queue:
            with self._lock:
                wait = self._turnover.wait(waiting)
            raise ApiError(
                429,
                f"{self.most} answers are in progress and {waiting} requests wait; try again in "
                f"{wait} s",
                kind=LIMITED,
                code="too_many_requests",
                wait=wait,
            )
        job = Job()
        given = {**self._drafting, **options, "blocks": list(blocks)}
        future = self._threads.submit(self._work, job, list(prompt), given)
        self._jobs.append((job, future))
        job.watch(future)
        return job

    def _work(self, job: Job, prompt: list[int], options: dict[str, Any]) -> None:
        with self._lock:
            connection = self._free(prompt, options["blocks"])
            self._turnover.take(job)
        try:
            with closing(self._answer(connection, prompt, options)) as tokens:
                for token in tokens:
                    for report in token.reports:
                        self._metrics.step(asdict(report))
                    job.put(token)
                    if job.is_left:
                        return
        finally:
            with self._lock:
                self.setup, self.limits = connection.setup, connection.limits
                self._idle.append(connection)
                self._turnover.leave(job)

    def _free(self, prompt: Sequence[int], blocks: Sequence[int] = ()) -> Connection:
        """Take an idle connection: of the open ones, that which has most of the prompt cached."""
        kept = [connection for connection in self._idle if connection.is_open]
        if not (kept or self._idle):
            return self._connect()
        found = max(kept or self._idle, key=lambda connection: connection.cached(prompt, blocks))
        self._idle.remove(found)
        return found

    def _answer(
        self, connection: Connection, prompt: list[int], options: dict[str, Any]
    ) -> Generator[Token, None, None]:
        """An answer's tokens. A session that ended while idle is reopened."""
        kept, begun = connection.is_open, False
        try:
            with closing(connection.generate(prompt, **options)) as tokens:
                for token in tokens:
                    begun = True
                    yield token
            return
        except PartyError:
            if begun or not kept:
                raise
        yield from connection.generate(prompt, **options)

    def close(self) -> None:
        """End all sessions, after the steps in progress."""
        for job, _ in self._jobs:
            job.leave()
        self._threads.shutdown()
        for connection in self._idle:
            connection.close()
