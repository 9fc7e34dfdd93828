"""What travels over a connection: frames, their kinds and sizes, and what a peer says of itself.

A frame is a 16-byte header (kind, number of the frame, length) and its payload.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from typing import Any

import torch

from mergec.runtime.core.errors import BusyError, PartyError, PeerEndedError, PeerStoppedError

HEADER = struct.Struct("!BxxxIQ")
"""Kind, number and length of a frame."""

NOTHING = memoryview(b"")

MAX_TEXT = 1 << 16
"""Largest JSON frame, in bytes."""

MAX_BLOCK = 4 << 20
"""Largest frame of the dealer's stream, in bytes."""

_LONGEST_WAIT = 86_400
"""Most seconds that a peer may ask to wait for a session."""

_LAST_WORDS = 400
"""Most characters taken from a peer's error message."""


class Kind(enum.IntEnum):
    """What a frame contains."""

    HELLO = 1
    """JSON: what a role states about itself (`runtime.session.hello`)."""
    ERROR = 2
    """JSON: why the sender ends the session, whether a person stopped it, and after how many
    seconds there may be room for another one. May be sent instead of any other kind."""
    QUEUED = 3
    """JSON: the session has to wait."""
    ADMITTED = 4
    """JSON: the session has a slot, and its number."""
    BEGIN = 5
    """JSON: the client is about to request an answer."""
    ACCEPTED = 6
    """JSON: the request is accepted."""
    REFUSED = 7
    """JSON: the request is refused, and why; the session continues."""
    STEP = 8
    """Two numbers: new and past tokens."""
    ROUND = 9
    """One party's message of a round."""
    DONE = 10
    """Empty: the answer is complete, or abandoned."""
    END = 11
    """Empty: the session is over."""
    SEED = 12
    """From the dealer: the party's seed, and the session's public salt."""
    BLOCK = 13
    """A block of the dealer's stream."""
    MARK = 14
    """Empty: what follows in the dealer's stream belongs to the next answer, or comes after a step
    that was dealt ahead."""
    PLAN = 15
    """JSON: what to deal ahead of time."""
    STORED = 16
    """JSON: the randomness dealt ahead is now stored."""
    KEPT = 17
    """JSON: whether the client has kept the hidden weights that the server named."""
    OBJECT = 18
    """JSON: a plain object that CrypTen sends (`runtime.transport.communicator`)."""
    TAKEN = 19
    """JSON: the client has used up an answer of the store, and the head of its journal since."""
    ALIVE = 20
    """Empty: a heartbeat. May come before any other frame."""
    AHEAD = 21
    """Like STEP: a step that the dealer is to deal now, and that may follow later."""


class Incoming:
    """A frame that is being received. rest: the part of the payload that has not arrived yet."""

    __slots__ = ("_accept", "begun", "complete", "kind", "payload", "rest")

    def __init__(self, accept: Callable[[tuple[int, int, int]], memoryview]) -> None:
        self._accept = accept
        self.begun = self.complete = False
        self.kind = 0
        self.payload = self.rest = NOTHING

    def begin(self, header: tuple[int, int, int]) -> None:
        self.payload = self.rest = self._accept(header)
        self.kind, self.begun = header[0], True
        self.complete = not self.rest

    def advance(self, count: int) -> None:
        self.rest = self.rest[count:]
        self.complete = not self.rest


def ending(fields: dict[str, Any], peer: str) -> PeerEndedError:
    """The error for a peer that said why it ends the session, in the fields of an ERROR frame."""
    told = f"the {peer} says: {printable(str(fields.get('reason', '')))}"
    wait = fields.get("wait")
    if type(wait) is int and 0 < wait <= _LONGEST_WAIT:
        return BusyError(told, wait)
    return PeerStoppedError(told) if fields.get("stopped") is True else PeerEndedError(told)


def printable(text: str) -> str:
    """A peer's text as one short line that is safe to print."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 2 * _LAST_WORDS])
    return " ".join(shown.split())[:_LAST_WORDS]


def check_payload(data: torch.Tensor) -> None:
    """Raise PartyError unless a message is 1-D uint8 on the CPU, as every caller must ensure."""
    if data.dtype is not torch.uint8 or data.dim() != 1 or not data.is_cpu:
        raise PartyError(
            f"a message must be a flat uint8 tensor on the CPU, not {data.dtype} {list(data.shape)}"
        )
