"""One round on the wire: all messages that are due go in one piece, each way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Message, Swap, ToClient, ToServer
from mergec.runtime.core.spec import CLIENT, DEALER, SERVER
from mergec.runtime.correlations.prg import NUMPY
from mergec.runtime.kernels.transfers import to_device, to_host
from mergec.runtime.transport.pipeline import Arriving, Pipeline
from mergec.runtime.transport.traffic import Exchange


def exchange(context: Context, link: Exchange | None, messages: Sequence[Message]) -> list[Any]:
    """Send and receive every message of a round, and return the replies in the same order.

    The reply to a message that this party only sends is None. The dealer has no link (`None`): it
    sends nothing, and its replies are tensors without data.
    """
    party = context.party
    if link is None or party == DEALER:
        return [_ghost(message) for message in messages]
    outgoing, incoming = _directions(party, messages)
    return _matched(context, messages, link.exchange(pack(outgoing), _size(incoming)), incoming)


def send(context: Context, link: Pipeline | None, messages: Sequence[Message]) -> Arriving | None:
    """Send a round's messages without waiting for the other party's; for `replies`."""
    if link is None or context.party == DEALER:
        return None
    outgoing, incoming = _directions(context.party, messages)
    return link.begin(pack(outgoing), _size(incoming))


def replies(context: Context, messages: Sequence[Message], arriving: Arriving | None) -> list[Any]:
    """What `exchange` returns, of messages that were sent before: waits for them."""
    if arriving is None:
        return [_ghost(message) for message in messages]
    _, incoming = _directions(context.party, messages)
    return _matched(context, messages, arriving(), incoming)


def _directions(
    party: int, messages: Sequence[Message]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The payloads that a party sends, and stand-ins for those that it receives."""
    sent, received = _sent_by(party), _sent_by(SERVER - party)
    outgoing = [m.payload for m in messages if type(m) is not received]
    return outgoing, [m.payload for m in messages if type(m) is not sent]


def _matched(
    context: Context,
    messages: Sequence[Message],
    reply: torch.Tensor,
    incoming: Sequence[torch.Tensor],
) -> list[Any]:
    parts = unpack(reply, incoming, context.device)
    if len(parts) == len(messages):
        return parts
    sent, rest = _sent_by(context.party), iter(parts)
    return [None if type(m) is sent else next(rest) for m in messages]


def _size(payloads: Sequence[torch.Tensor]) -> int:
    return sum(payload.nbytes for payload in payloads)


def online_bytes(message: Message) -> int:
    """Bytes that a message takes on the wire, both directions together."""
    size = message.payload.nbytes
    return 2 * size if isinstance(message, Swap) else size


def pack(payloads: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The payloads' bytes one after the other, without padding; None if there are none."""
    if not payloads:
        return None
    parts = [p.contiguous().view(-1).view(torch.uint8) for p in payloads]
    return to_host(parts[0] if len(parts) == 1 else torch.cat(parts), "message")


def unpack(
    reply: torch.Tensor, payloads: Sequence[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """The parts of a packed message; each has the shape and dtype of one of the payloads."""
    moved = to_device(reply, device, "message")
    if moved is not reply:
        return list(_parts(moved, payloads))
    data, start, parts = reply.numpy().data, 0, []
    for like in payloads:
        # A view by numpy takes a third of the time that slice, type and shape take in torch.
        words = np.ndarray(like.shape, NUMPY[like.dtype], data, start)
        parts.append(torch.from_numpy(words if words.flags.aligned else words.copy()))
        start += words.nbytes
    return parts


def _parts(data: torch.Tensor, payloads: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """`unpack` of a message that is on a device."""
    start = 0
    for like in payloads:
        part = data[start : start + like.nbytes]
        aligned = part if start % like.itemsize == 0 else part.clone()
        start += like.nbytes
        yield aligned.view(like.dtype).reshape(like.shape)


def _sent_by(party: int) -> type[Message]:
    return ToServer if party == CLIENT else ToClient


def _ghost(message: Message) -> torch.Tensor:
    """What the dealer has in place of a reply; most payloads have no data there to begin with."""
    return message.payload if message.payload.is_meta else message.payload.to("meta")
