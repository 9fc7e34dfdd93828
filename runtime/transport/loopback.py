"""Links and dealer streams within one process, as queues between threads: for tests."""

from __future__ import annotations

import queue
import threading

import torch

from mergec.runtime.core.errors import PartyError, PeerEndedError, PeerSilentError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.transport.dealer_link import (
    AHEAD_BYTES,
    BLOCK_BYTES,
    DealerReceiver,
    DealerSender,
)
from mergec.runtime.transport.frames import check_payload
from mergec.runtime.transport.traffic import Traffic

Pipe = queue.SimpleQueue[torch.Tensor | None]


class LoopbackLink:
    """One end of a link to another thread."""

    def __init__(self, outbox: Pipe, inbox: Pipe, peer: str, timeout: float) -> None:
        self.traffic = Traffic()
        self._outbox, self._inbox = outbox, inbox
        self._peer, self._timeout = peer, timeout

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor:
        """Like `Channel.exchange`; raises PartyError if a message has an unexpected length."""
        self.post(outgoing)
        return self.collect(incoming)

    def post(self, outgoing: torch.Tensor | None) -> None:
        """Send a message."""
        if outgoing is not None and outgoing.numel():
            check_payload(outgoing)
            self._outbox.put(outgoing.clone())
            self.traffic.sent += outgoing.numel()

    def collect(self, incoming: int) -> torch.Tensor:
        """Receive the message of the next round."""
        reply = torch.empty(0, dtype=torch.uint8)
        if incoming:
            try:
                received = self._inbox.get(timeout=self._timeout)
            except queue.Empty as error:
                reason = f"the {self._peer} sent nothing for {self._timeout:g} s"
                raise PeerSilentError(reason) from error
            if received is None:
                raise PeerEndedError(f"the {self._peer} went away")
            if received.numel() != incoming:
                raise PartyError(
                    f"the {self._peer} sent {received.numel()} bytes where {incoming} were expected"
                )
            reply = received
        self.traffic.received += incoming
        self.traffic.rounds += 1
        return reply

    def close(self) -> None:
        """Make the other end fail instead of wait."""
        self._outbox.put(None)


def link_pair(timeout: float = 30.0) -> tuple[LoopbackLink, LoopbackLink]:
    """The client's and the server's end of a link."""
    one: Pipe = queue.SimpleQueue()
    other: Pipe = queue.SimpleQueue()
    return (
        LoopbackLink(one, other, ROLES[1], timeout),
        LoopbackLink(other, one, ROLES[0], timeout),
    )


class _Blocks:
    """Passes blocks one at a time, so that a dealer in the same memory runs no further ahead."""

    def __init__(self) -> None:
        self._block: torch.Tensor | None = None
        self._ended = False
        self._changed = threading.Condition()

    def put(self, block: torch.Tensor) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._block is None or self._ended)
            if self._ended:
                raise PeerEndedError("the session ended while the dealer was working")
            self._block = block
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def get(self) -> torch.Tensor | None:
        with self._changed:
            self._changed.wait_for(lambda: self._block is not None or self._ended)
            block, self._block = self._block, None
            self._changed.notify_all()
            return block

    def deadline(self, since: float, limit: float) -> float:
        return since + limit

    def silent(self, since: float, limit: float) -> PartyError:
        return PeerSilentError(f"the dealer sent nothing for {limit:g} s; check what it is doing")


def dealer_pair(
    block_bytes: int = BLOCK_BYTES, ahead_bytes: int = AHEAD_BYTES, timeout: float = 30.0
) -> tuple[DealerSender, DealerReceiver]:
    """The two ends of a dealer's stream."""
    blocks = _Blocks()
    return DealerSender(blocks, block_bytes), DealerReceiver(blocks, ahead_bytes, timeout)
