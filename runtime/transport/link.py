"""The link between client and server: one call is one round."""

from __future__ import annotations

from typing import Protocol

import torch

from runtime.errors import PartyError
from runtime.transport.communicator import CountingCommunicator
from runtime.transport.traffic import Traffic


class Exchange(Protocol):
    """What a link offers, over whatever transport."""

    @property
    def traffic(self) -> Traffic: ...

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor: ...


class Link:
    """One party's end, on the communicator's connection to the other party."""

    def __init__(self, communicator: CountingCommunicator) -> None:
        self._communicator = communicator
        self._peer = communicator.peer

    @property
    def traffic(self) -> Traffic:
        return self._communicator.traffic

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor:
        """Send `outgoing` (1-D uint8 on the CPU) while receiving `incoming` bytes; one round.

        Both parties call this for every round, also for one in which a message goes one way only.
        """
        communicator, peer = self._communicator, self._peer
        reply = torch.empty(incoming, dtype=torch.uint8)
        # Gloo moves data only once the receiver is ready: the receive goes first.
        receiving = communicator.irecv(reply, peer) if incoming else None
        sending = None
        if outgoing is not None and outgoing.numel():
            check_payload(outgoing)
            sending = communicator.isend(outgoing, peer)
        communicator.traffic.rounds += 1
        communicator.wait(peer, *(work for work in (receiving, sending) if work is not None))
        return reply


def check_payload(data: torch.Tensor) -> None:
    """A message is a flat run of bytes; anything else is a mistake of the caller."""
    if data.dtype is not torch.uint8 or data.dim() != 1 or data.device.type != "cpu":
        raise PartyError(
            f"a message must be a flat uint8 tensor on the CPU, not {data.dtype} {list(data.shape)}"
        )
