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

PROTOCOL_VERSION = 1
"""Raised with every change of what parties send each other."""

WORDS = 16
"""int64 words of every control message: an opcode, then its numbers."""

MODES = ("mergec", "crypten")
_HASH_WORDS = 4


class Opcode(enum.IntEnum):
    """What a control message says."""

    HELLO = 1
    STEP = 2
    END = 3
    ABORT = 4


@dataclass(frozen=True)
class Hello:
    """What a party says of itself before any share is sent."""

    role: str
    mode: str
    program_hash: str
    version: int = PROTOCOL_VERSION
    fixed: int = 16
    debug: int = 0
    """Options that change what is sent, such as insecure randomness."""

    def words(self) -> list[int]:
        data = bytes.fromhex(self.program_hash)
        if len(data) != 8 * _HASH_WORDS:
            raise PartyError(f"{self.program_hash!r} is not a SHA-256 program hash")
        hashed = [
            int.from_bytes(data[8 * i : 8 * i + 8], "big", signed=True) for i in range(_HASH_WORDS)
        ]
        return [
            self.version,
            ROLES.index(self.role),
            MODES.index(self.mode),
            *hashed,
            self.fixed,
            self.debug,
        ]

    @classmethod
    def from_words(cls, words: list[int], rank: int) -> Hello:
        version, role, mode, *rest = words
        if version != PROTOCOL_VERSION:
            # The meaning of the other words belongs to that version.
            return cls(ROLES[rank], MODES[0], "", version)
        data = b"".join(word.to_bytes(8, "big", signed=True) for word in rest[:_HASH_WORDS])
        fixed, debug = rest[_HASH_WORDS : _HASH_WORDS + 2]
        known = 0 <= role < len(ROLES) and 0 <= mode < len(MODES)
        if not known:
            raise PartyError(f"the {ROLES[rank]} sent a greeting that cannot be read")
        return cls(ROLES[role], MODES[mode], data.hex(), version, fixed, debug)


@dataclass(frozen=True)
class Message:
    """A request of the client."""

    opcode: Opcode
    numbers: tuple[int, ...] = ()


def compare(mine: Hello, theirs: Hello, rank: int) -> None:
    """PartyError that says what differs, and what to do about it, if anything does."""
    peer = ROLES[rank]
    if mine.version != theirs.version:
        differing = f"speaks version {theirs.version} of the protocol, this party {mine.version}"
        remedy = "install the same mergec everywhere"
    elif theirs.role != peer:
        differing = f"joined in the place of the {peer} but says it is the {theirs.role}"
        remedy = "start each role once"
    elif mine.mode != theirs.mode:
        differing = f"runs in mode {theirs.mode}, this party in mode {mine.mode}"
        remedy = "give all three the same --mode"
    elif mine.program_hash != theirs.program_hash:
        differing = (
            f"has the program {theirs.program_hash[:12]}, this party {mine.program_hash[:12]}"
        )
        remedy = "give all three the bundles of one compilation"
    elif mine.fixed != theirs.fixed:
        differing = f"computes with {theirs.fixed} fractional bits, this party with {mine.fixed}"
        remedy = "give all three the bundles of one compilation"
    elif mine.debug != theirs.debug:
        differing = "was started with other debugging options"
        remedy = "start all three with the same"
    else:
        return
    raise PartyError(f"the {peer} {differing}; {remedy}")


class Control:
    """One role's end of the control channel, over a connection of its own."""

    def __init__(self, communicator: CountingCommunicator) -> None:
        self._communicator = communicator
        self._group = communicator.control_group
        self._sent: deque[tuple[torch.Tensor, Any]] = deque()

    def greet(self, hello: Hello) -> None:
        """Compare versions, modes, programs and roles with the two others."""
        mine = _pack(Opcode.HELLO, hello.words())
        greetings = [torch.empty_like(mine) for _ in ROLES]
        peer = SERVER if self._communicator.rank == CLIENT else CLIENT
        with peer_errors(peer):
            work = dist.all_gather(greetings, mine, group=self._group, async_op=True)
        self._communicator.wait(peer, work)
        for rank, greeting in enumerate(greetings):
            if rank != self._communicator.rank:
                opcode, *words = greeting.tolist()
                if opcode != Opcode.HELLO:
                    raise PartyError(f"the {ROLES[rank]} sent something else than a greeting")
                compare(hello, Hello.from_words(words, rank), rank)

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
