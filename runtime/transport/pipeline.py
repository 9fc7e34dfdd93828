"""Rounds that are on the way at the same time: a party computes while they travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from mergec.runtime.transport.traffic import Exchange

Arriving = Callable[[], torch.Tensor]
"""Waits for the other party's message of a round, and returns it; raises what a link raises."""


class Pipeline:
    """Sends the messages of a link in the order of `begin`, and receives the other party's so.

    Both happen in threads of their own. So neither waits for the other, and full buffers at both
    ends do not stop a party that computes.
    """

    def __init__(self, link: Exchange, sending: ThreadPoolExecutor, taking: ThreadPoolExecutor):
        self._link, self._sending, self._taking = link, sending, taking

    def begin(self, outgoing: torch.Tensor | None, incoming: int) -> Arriving:
        """Send a message, and receive one of `incoming` bytes: a round, as `Exchange.exchange`."""
        sent = self._sending.submit(self._link.post, outgoing)
        taken = self._taking.submit(self._link.collect, incoming)

        def arriving() -> torch.Tensor:
            reply = taken.result()
            sent.result()
            return reply

        return arriving


@contextmanager
def pipelined(link: Exchange | None) -> Iterator[Pipeline | None]:
    """A pipeline over a link; the link is used by nothing else within. None without a link."""
    if link is None:
        yield None
        return
    sending, taking = (ThreadPoolExecutor(1, name) for name in ("sending", "taking"))
    try:
        yield Pipeline(link, sending, taking)
    finally:
        # After an error nobody waits for what is still on its way.
        for pool in (sending, taking):
            pool.shutdown(wait=False, cancel_futures=True)
