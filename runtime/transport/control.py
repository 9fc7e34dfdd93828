"""Control messages: what the roles agree on before a session, and what the client asks for."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from runtime.errors import PartyError
from runtime.spec import CLIENT, DEALER, ROLES, SERVER
from runtime.transport.communicator import IDLE_TIMEOUT, CountingCommunicator, peer_errors
from runtime.transport.hello import Hello, compare

WORDS = 16
"""int64 words of every control message: an opcode, then its numbers."""

GREETING_BYTES = 1 << 14
"""A greeting is padded to this length, as gloo gathers tensors of one shape."""


class Opcode(enum.IntEnum):
    """What a control message says."""

    STEP = 1
    END = 2
    ABORT = 3


@dataclass(frozen=True)
class Message:
    """A request of the client."""

    opcode: Opcode
    numbers: tuple[int, ...] = ()


class Control:
    """One role's end of the control channel, over a connection of its own."""

    def __init__(self, communicator: CountingCommunicator) -> None:
        self._communicator = communicator
        self._group = communicator.control_group
        self._sent: deque[tuple[torch.Tensor, Any]] = deque()

    def greet(self, hello: Hello) -> None:
        """Compare versions, modes, programs and roles with the two others."""
        text = hello.encode().ljust(GREETING_BYTES)
        if len(text) > GREETING_BYTES:
            raise PartyError("the program has more passes than a greeting can name")
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        greetings = [torch.empty_like(mine) for _ in ROLES]
        peer = SERVER if self._communicator.rank == CLIENT else CLIENT
        with peer_errors(peer):
            work = dist.all_gather(greetings, mine, group=self._group, async_op=True)
        self._communicator.wait(peer, work)
        for rank, greeting in enumerate(greetings):
            if rank != self._communicator.rank:
                theirs = Hello.decode(greeting.numpy().tobytes(), ROLES[rank])
                compare(hello, theirs, ROLES[rank])

    def send(self, opcode: Opcode, *numbers: int, to: tuple[int, ...] = (SERVER, DEALER)) -> None:
        """From the client: tell the others what comes next. Does not wait for them."""
        for party in to:
            data = _pack(opcode, list(numbers))
            with peer_errors(party):
                self._sent.append((data, self._group.send([data], party, 0)))
        # A reference keeps the data alive until it has gone out.
        while self._sent and self._sent[0][1].is_completed():
            self._sent.popleft()

    def receive(self) -> Message:
        """At server and dealer: wait for the client's next request."""
        data = torch.empty(WORDS, dtype=torch.int64)
        with peer_errors(CLIENT, IDLE_TIMEOUT):
            self._group.recv([data], CLIENT, 0).wait(timedelta(seconds=IDLE_TIMEOUT))
        return unpack(data)


def unpack(data: torch.Tensor) -> Message:
    """A control message from its words."""
    code, *numbers = data.tolist()
    try:
        return Message(Opcode(code), tuple(numbers))
    except ValueError as error:
        raise PartyError(f"the client sent an unknown request ({code})") from error


def _pack(opcode: Opcode, numbers: list[int]) -> torch.Tensor:
    return torch.tensor([int(opcode), *numbers] + [0] * (WORDS - 1 - len(numbers)))
