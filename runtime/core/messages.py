"""What a protocol yields: the messages of one round, which the scheduler sends.

A protocol is a generator. It yields a message, or a tuple of messages that belong to one round, and
is resumed with the other party's messages. Protocols of independent ops, and the parts of one op
joined by `together`, advance in lockstep and so share rounds.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Swap:
    """Each party sends `payload` and receives the other's, which has equal shape and type."""

    payload: torch.Tensor


@dataclass
class ToServer:
    """The client sends `payload`. The server passes a meta tensor and receives it."""

    payload: torch.Tensor


@dataclass
class ToClient:
    """The server sends `payload`. The client passes a meta tensor and receives it."""

    payload: torch.Tensor


Message = Swap | ToServer | ToClient
Protocol = Generator[Any, Any, Any]


def together(*protocols: Protocol) -> Protocol:
    """Run protocols in lockstep, so that their messages share rounds; returns their results."""
    results: list[Any] = [None] * len(protocols)
    waiting: dict[int, Message | tuple[Message, ...]] = {}

    def advance(index: int, reply: Any) -> None:
        try:
            waiting[index] = protocols[index].send(reply)
        except StopIteration as stop:
            results[index] = stop.value

    for index in range(len(protocols)):
        advance(index, None)
    while waiting:
        batch = sorted(waiting.items())
        waiting = {}
        replies = yield tuple(message for _, yielded in batch for message in as_tuple(yielded))
        start = 0
        for index, yielded in batch:
            stop = start + len(as_tuple(yielded))
            advance(index, as_reply(yielded, replies[start:stop]))
            start = stop
    return results


def as_tuple(yielded: Message | tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages of a round as a tuple, whether the protocol yielded a tuple or one message."""
    return yielded if isinstance(yielded, tuple) else (yielded,)


def as_reply(yielded: Message | tuple[Message, ...], replies: list[Any]) -> Any:
    """What a protocol is resumed with: a list if it yielded a tuple, else the one reply."""
    return replies if isinstance(yielded, tuple) else replies[0]
