"""Tells peers that this party is at work while it computes, or waits for somebody else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEAT = 1.0
"""Seconds of silence after which a party at work sends a heartbeat."""


class Pulse:
    """Calls each of `beats` every `BEAT` seconds while there is work, from a thread of its own.

    Heartbeats follow the clock alone and touch no data, so they tell a peer only that the process
    runs and that the step is not over, which it learns from the step's messages anyway.

    The hot loops run without Python's global lock, and torch's operators release it, so the thread
    gets its turn within a step. It never waits for a peer: see `Channel.beat`.
    """

    def __init__(self) -> None:
        self.beats: list[Callable[[], object]] = []
        self._changed = threading.Condition()
        self._depth = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within this context the party is at work; when it is left, no heartbeat follows."""
        with self._changed:
            self._depth += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                if not self._depth:
                    self._changed.wait()
                    continue
                self._changed.wait(BEAT)
                if self._depth and not self._closed:
                    for beat in self.beats:
                        beat()
