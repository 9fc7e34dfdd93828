"""CrypTen's communicator over channels: runs its protocols over TLS or between local processes.

A drop-in replacement for CrypTen's communicator over torch.distributed, without pickle. The bytes
of a tensor have the length that its receiver expects, and objects are JSON of a few plain types.
The channels count all traffic.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed import ReduceOp

from mergec.runtime.core.errors import MergecError, PartyError
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER
from mergec.runtime.crypten import compat as crypten
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.frames import Kind
from mergec.runtime.transport.traffic import Traffic

_REDUCE: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}

_DTYPES = {
    str(dtype): dtype
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64)
}


class ChannelCommunicator(crypten.Communicator):
    """One role's communicator; `install` makes CrypTen use it.

    Each computing party has a channel to the other one. The dealer, which is CrypTen's trusted
    third party where there is one, has a channel to both. A collective of the two parties is one
    round, in which a party's tensor is sent once. Messages between the same two roles keep their
    order. Non-blocking messages are sent when the first of them is waited for.
    """

    instance: ChannelCommunicator | None = None
    # CrypTen reads these and passes them back as `group`. Here the peer alone identifies the group.
    main_group = ttp_group = ttp_comm_group = None

    def __init__(
        self, role: str, channels: Mapping[int, Channel], idle_timeout: float | None = None
    ) -> None:
        """channels: by the peer's rank, which is its position in `ROLES`.

        idle_timeout: seconds that the dealer waits for a request; default: the channel's timeout.
        """
        self.rank = ROLES.index(role)
        self.world_size = 2
        self.ttp_initialized = DEALER in {self.rank, *channels}
        self.comm_time = 0.0
        self._name = role
        self._idle_timeout = idle_timeout
        self._channels = dict(channels)
        self._counted_from = Traffic()
        self._unsent: dict[int, deque[torch.Tensor]] = {peer: deque() for peer in channels}
        self._due: dict[int, deque[Any]] = {peer: deque() for peer in channels}

    def install(self) -> None:
        """Make CrypTen use this communicator instead of its own over torch.distributed."""
        crypten.install(ChannelCommunicator)
        ChannelCommunicator.instance = self

    @classmethod
    def is_initialized(cls) -> bool:
        return cls.instance is not None

    @classmethod
    def get(cls) -> ChannelCommunicator | None:
        return cls.instance

    @classmethod
    def initialize(cls, *_: Any, **__: Any) -> None:
        raise MergecError("CrypTen has no connections yet; install a ChannelCommunicator first")

    @classmethod
    def shutdown(cls) -> None:
        """Close all channels."""
        running, cls.instance = cls.instance, None
        if running is not None:
            for channel in running._channels.values():
                channel.close()

    # ------------------------------------------------------------------------ who and how much

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world_size

    def get_ttp_rank(self) -> int:
        return DEALER

    def set_name(self, name: str) -> None:
        self._name = name

    def get_name(self) -> str:
        return self._name

    @property
    def peer(self) -> int:
        """The rank of the other computing party."""
        return SERVER - self.rank

    @property
    def traffic(self) -> Traffic:
        """Traffic of all channels; traffic between a party and the dealer counts as offline."""
        found = Traffic()
        for peer, channel in self._channels.items():
            counted = channel.traffic
            if DEALER in (peer, self.rank):
                found.offline_sent += counted.sent
                found.offline_received += counted.received
            else:
                found.rounds += counted.rounds
                found.sent += counted.sent
                found.received += counted.received
        return found

    @property
    def comm_rounds(self) -> int:
        """Rounds between the two parties since CrypTen's statistics were reset."""
        return (self.traffic - self._counted_from).rounds

    @property
    def comm_bytes(self) -> int:
        """Bytes between the two parties, both directions, since the statistics were reset."""
        return (self.traffic - self._counted_from).online

    def reset_communication_stats(self) -> None:
        self._counted_from = self.traffic
        self.comm_time = 0.0

    # -------------------------------------------------------------------------------- messages

    def _exchange(self, peer: int, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor:
        """One round with a peer, after its pending messages."""
        self._settle(peer)
        return self._round(peer, outgoing, incoming)

    def _round(self, peer: int, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor:
        began = time.perf_counter()
        reply = self._channel(peer).exchange(outgoing, incoming)
        self.comm_time += time.perf_counter() - began
        return reply

    def _channel(self, peer: int) -> Channel:
        if peer not in self._channels:
            raise MergecError(f"there is no party {peer} that party {self.rank} is connected to")
        return self._channels[peer]

    def _settle(self, peer: int) -> None:
        """Complete pending `isend` and `irecv` calls, in both directions at once where possible."""
        self._channel(peer)
        unsent, due = self._unsent[peer], self._due[peer]
        while unsent or due:
            outgoing = unsent.popleft() if unsent else None
            into = due.popleft() if due else None
            reply = self._round(peer, outgoing, 0 if into is None else _nbytes(into))
            if into is not None:
                _fill(into, reply)

    def isend(self, tensor: Any, dst: int) -> _Pending:
        self._channel(dst)
        self._unsent[dst].append(_flat([tensor]))
        return _Pending(lambda: self._settle(dst))

    def irecv(self, tensor: Any, src: int | None = None) -> _Pending:
        source = self.peer if src is None else src
        self._channel(source)
        self._due[source].append(tensor)
        return _Pending(lambda: self._settle(source))

    def send(self, tensor: Any, dst: int) -> None:
        self._exchange(dst, _flat([tensor]), 0)

    def recv(self, tensor: Any, src: int | None = None) -> Any:
        source = self.peer if src is None else src
        (result,) = _like([tensor], self._exchange(source, None, _nbytes(tensor)))
        return result

    def barrier(self) -> None:
        """Exchange one byte in each direction, so that each party knows the other has arrived."""
        self._exchange(self.peer, torch.zeros(1, dtype=torch.uint8), 1)

    # ----------------------------------------------------------------------------- collectives

    def all_reduce(self, input: Any, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:  # noqa: A002
        tensors = list(input) if batched else [input]
        mine = _flat(tensors)
        theirs = _like(tensors, self._exchange(self.peer, mine, mine.numel()))
        results = [_reduced(op, *both) for both in zip(tensors, theirs, strict=True)]
        return results if batched else results[0]

    def reduce(self, input: Any, dst: int, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:  # noqa: A002
        tensors = list(input) if batched else [input]
        if dst != self.rank:
            self._exchange(dst, _flat(tensors), 0)
            return None
        theirs = _like(tensors, self._exchange(self.peer, None, sum(map(_nbytes, tensors))))
        results = [_reduced(op, *both) for both in zip(tensors, theirs, strict=True)]
        return results if batched else results[0]

    def all_gather(self, tensor: Any) -> list[Any]:
        (theirs,) = _like([tensor], self._exchange(self.peer, _flat([tensor]), _nbytes(tensor)))
        return self._by_rank(tensor, theirs)

    def gather(self, tensor: Any, dst: int) -> list[Any]:
        if dst != self.rank:
            self._exchange(dst, _flat([tensor]), 0)
            return [None]
        (theirs,) = _like([tensor], self._exchange(self.peer, None, _nbytes(tensor)))
        return self._by_rank(tensor, theirs)

    def _by_rank(self, mine: Any, theirs: Any) -> list[Any]:
        return [mine.clone(), theirs] if self.rank == CLIENT else [theirs, mine.clone()]

    def scatter(self, scatter_list: Any, src: int, size: Any = None, device: Any = None) -> Any:
        """This party's int64 part of shape `size`, of those that `src` has."""
        if src == self.rank:
            self._exchange(self.peer, _flat([scatter_list[self.peer]]), 0)
            mine = scatter_list[self.rank]
            return mine if device is None else mine.to(device)
        shape = scatter_list[self.rank].size() if size is None else size
        result = torch.empty(shape, dtype=torch.int64, device=device)
        return self.recv(result, src)

    def broadcast(self, input: Any, src: int, group: Any = None, batched: bool = False) -> Any:  # noqa: A002
        """Overwrite `input` with that of `src`; returns it. The dealer sends to the client only."""
        tensors = list(input) if batched else [input]
        if src == self.rank:
            other = CLIENT if self.rank == DEALER else self.peer
            self._exchange(other, _flat(tensors), 0)
            return input
        replies = _like(tensors, self._exchange(src, None, sum(map(_nbytes, tensors))))
        for tensor, reply in zip(tensors, replies, strict=True):
            tensor.copy_(reply)
        return input

    # --------------------------------------------------------------------------------- objects

    def send_obj(self, obj: Any, dst: int, group: Any = None) -> None:
        """Send None, a bool, number, string, dtype, list, tuple, size, or dictionary of those.

        Raises MergecError for any other type.
        """
        payload = json.dumps(_plain(obj)).encode()
        self._settle(dst)
        channel = self._channel(dst)
        channel.send(Kind.OBJECT, payload)
        channel.traffic.sent += len(payload)
        channel.traffic.rounds += 1

    def recv_obj(self, src: int, group: Any = None) -> Any:
        self._settle(src)
        channel = self._channel(src)
        # The third party is idle between two prompts.
        idle = self._idle_timeout if self.rank == DEALER else None
        _, payload = channel.receive_any((Kind.OBJECT,), timeout=idle)
        channel.traffic.received += payload.nbytes
        channel.traffic.rounds += 1
        try:
            return _object(json.loads(bytes(payload)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PartyError(f"the {channel.peer} sent an object that cannot be read") from error

    def broadcast_obj(self, obj: Any, src: int, group: Any = None) -> Any:
        if self.rank != src:
            return self.recv_obj(src)
        self.send_obj(obj, self.peer)
        return obj


class _Pending:
    """A message in transit."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


# Messages are copied through the CPU. Tensors may be CrypTen's CUDALongTensor, which `_flat`
# unwraps and `_like` restores.


def _flat(tensors: Sequence[Any]) -> torch.Tensor:
    """The bytes of tensors, concatenated."""
    parts = [tensor.data.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _like(tensors: Sequence[Any], data: torch.Tensor) -> list[Any]:
    """Tensors with the shapes, types and devices of `tensors`, from their bytes."""
    results: list[Any] = []
    for tensor, part in zip(tensors, data.split([_nbytes(t) for t in tensors]), strict=True):
        # A part of a larger message may start at any byte; a tensor must be aligned.
        owned = part if len(tensors) == 1 else part.clone()
        found = owned.view(tensor.dtype).reshape(tensor.size()).to(tensor.device)
        wrapped = isinstance(tensor, crypten.CUDALongTensor)
        results.append(crypten.CUDALongTensor(found) if wrapped else found)
    return results


def _fill(tensor: Any, data: torch.Tensor) -> None:
    (found,) = _like([tensor], data)
    tensor.copy_(found)


def _nbytes(tensor: Any) -> int:
    return int(tensor.nelement()) * int(tensor.element_size())


def _reduced(op: Any, mine: Any, theirs: Any) -> Any:
    if op not in _REDUCE:
        raise MergecError(f"tensors of two parties cannot be reduced by {op}")
    return _REDUCE[op](mine, theirs)


def _plain(value: Any) -> Any:
    """An object as JSON; a type that JSON lacks becomes a dictionary with one tagged entry."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype) and str(value) in _DTYPES:
        return {"dtype": str(value)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(item) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        tag = "size" if isinstance(value, torch.Size) else type(value).__name__
        if tag in ("size", "list", "tuple"):
            return {tag: [_plain(item) for item in value]}
    raise MergecError(
        f"a {type(value).__name__} cannot be sent as an object: parties send each other only "
        "tensors and plain values; load models at each party from a file"
    )


def _object(value: Any) -> Any:
    """The inverse of `_plain`. Raises ValueError, TypeError or KeyError for any other input."""
    if not isinstance(value, (dict, list)):
        return value
    if isinstance(value, list) or len(value) != 1:
        raise ValueError("not a dictionary with one tagged entry")
    ((tag, inner),) = value.items()
    if tag == "dtype":
        return _DTYPES[inner]
    if tag == "dict" and isinstance(inner, dict):
        return {key: _object(item) for key, item in inner.items()}
    if tag not in ("size", "list", "tuple") or not isinstance(inner, list):
        raise ValueError(f"unknown tag {tag}")
    items = [_object(item) for item in inner]
    return {"size": torch.Size, "list": list, "tuple": tuple}[tag](items)
