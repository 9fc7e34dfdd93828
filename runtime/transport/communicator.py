"""CrypTen's communicator, with counters, timeouts and errors that name the party they are about.

One TCP store at the client brings the three roles together; after that every pair has connections
of its own, by gloo. Our own protocols send tensors only. CrypTen's trusted third party, which
`crypten` mode uses, sends its requests as pickled objects, and reads them by CrypTen's restricted
unpickler: use that mode among parties that trust each other, for comparison.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from runtime import crypten_compat as crypten
from runtime.errors import PartyError
from runtime.spec import CLIENT, DEALER, ROLES, SERVER
from runtime.transport.address import Address
from runtime.transport.channel import REPLY_TIMEOUT
from runtime.transport.traffic import Traffic

JOIN_TIMEOUT = 30.0
"""Seconds that a party waits for the others to appear."""

IDLE_TIMEOUT = 7 * 24 * 3600.0
"""Seconds that server and dealer wait for the client's next prompt."""

_POLL = 0.02


@contextmanager
def peer_errors(peer: int, timeout: float = REPLY_TIMEOUT) -> Iterator[None]:
    """Turn gloo's errors into one that names the party that it waited for."""
    try:
        yield
    except RuntimeError as error:
        if "imed out" in str(error):
            reason = f"the {ROLES[peer]} sent nothing for {timeout:g} s; see what it is doing"
        else:
            reason = f"the {ROLES[peer]} went away; see its own message, and start all three again"
        raise PartyError(reason) from error


class CountingCommunicator(crypten.DistributedCommunicator):
    """The communicator of one role, installed as CrypTen's own.

    traffic: what this party sent and received. Collectives between the two parties count as one
    round, in which a party's tensor is sent once: what they are, whatever gloo makes of them.
    `isend` and `irecv` count bytes only, as their caller decides what a round is.
    """

    def __init__(
        self, role: str, address: Address, *, third_party: bool, join_timeout: float, timeout: float
    ) -> None:
        self.role = role
        self.rank = ROLES.index(role)
        self.address = address
        self.world_size = 2
        self.timeout = timeout
        self._limit = timedelta(seconds=timeout)
        self.traffic = Traffic()
        self.ttp_initialized = third_party
        self.distributed_backend = "gloo"
        self._name = role
        self.reset_communication_stats()
        deadline = time.monotonic() + join_timeout
        self._store = _meet(role, address, join_timeout)
        try:
            self._connect(max(1.0, deadline - time.monotonic()))
        except RuntimeError as error:
            reason = f"the parties met at {address} but could not connect ({_first_line(error)})"
            raise PartyError(f"{reason}; start all three again") from error

    def _connect(self, join_timeout: float) -> None:
        if self.address.loopback:
            # By itself gloo listens at what the host name resolves to.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        limit = timedelta(seconds=join_timeout)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("mergec", self._store),
            rank=self.rank,
            world_size=len(ROLES),
            timeout=limit,
        )
        everyone = list(range(len(ROLES)))
        self.ttp_group = dist.group.WORLD
        self.ttp_comm_group = dist.new_group([CLIENT, DEALER], timeout=limit)
        self.main_group = dist.new_group([CLIENT, SERVER], timeout=limit)
        self.control_group = dist.new_group(everyone, timeout=limit)
        # The dealer's streams have connections of their own, so that they never hold up a message.
        self.stream_groups = {
            party: dist.new_group([party, DEALER], timeout=limit) for party in (CLIENT, SERVER)
        }

    @classmethod
    def join(
        cls,
        role: str,
        rendezvous: str,
        *,
        third_party: bool = False,
        join_timeout: float = JOIN_TIMEOUT,
        timeout: float = REPLY_TIMEOUT,
    ) -> CountingCommunicator:
        """Meet the other two roles; PartyError names whoever does not come.

        third_party: whether the dealer serves as CrypTen's trusted third party.
        """
        found = cls(
            role,
            Address.rendezvous(rendezvous),
            third_party=third_party,
            join_timeout=join_timeout,
            timeout=timeout,
        )
        crypten.DistributedCommunicator.instance = found
        return found

    def leave(self, *, orderly: bool = True) -> None:
        """Close all connections; `orderly` first waits for the others to get here."""
        if orderly:
            others = SERVER if self.rank == CLIENT else CLIENT
            self._run([dist.barrier], others, self.control_group)
        crypten.DistributedCommunicator.instance = None
        dist.destroy_process_group()

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world_size

    @property
    def peer(self) -> int:
        """The other computing party."""
        return SERVER - self.rank

    # ---------------------------------------------------------------- between the two parties

    def _count(self, tensors: Sequence[torch.Tensor], *, sent: bool, received: bool) -> None:
        size = sum(map(_nbytes, tensors))
        self.traffic.rounds += 1
        self.traffic.sent += size if sent else 0
        self.traffic.received += size if received else 0

    def wait(self, peer: int, *works: Any) -> None:
        """Let transfers from or to `peer` end; PartyError if they don't in time."""
        # The groups' own timeout is that of joining.
        with peer_errors(peer, self.timeout):
            for work in works:
                work.wait(self._limit)

    def _run(
        self, calls: Sequence[Callable[..., Any]], peer: int | None = None, group: Any = None
    ) -> None:
        """Start collectives, of the two parties unless said otherwise, and wait for all."""
        other = self.peer if peer is None else peer
        with peer_errors(other):
            works = [call(group=self._default(group), async_op=True) for call in calls]
        self.wait(other, *works)

    def isend(self, tensor: torch.Tensor, dst: int) -> Any:
        self.traffic.sent += _nbytes(tensor)
        with peer_errors(dst):
            return self.main_group.send([tensor.data], dst, 0)

    def irecv(self, tensor: torch.Tensor, src: int | None = None) -> Any:
        source = self.peer if src is None else src
        self.traffic.received += _nbytes(tensor)
        with peer_errors(source):
            return self.main_group.recv([tensor.data], source, 0)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        self.traffic.rounds += 1
        self.wait(dst, self.isend(tensor.cpu(), dst))

    def recv(self, tensor: torch.Tensor, src: int | None = None) -> torch.Tensor:
        self.traffic.rounds += 1
        result = torch.empty_like(tensor, device="cpu")
        self.wait(self.peer, self.irecv(result, src))
        return result.to(tensor.device)

    # Gloo takes no CUDA tensors in some collectives, so all go by way of the CPU; and CrypTen's
    # CUDALongTensor, which these may be given, is unwrapped by `_host` and restored by `_like`.

    def all_reduce(self, input: Any, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:  # noqa: A002
        tensors = list(input) if batched else [input]
        results = [_host(tensor, copy=True) for tensor in tensors]
        self._count(results, sent=True, received=True)
        self._run([partial(dist.all_reduce, result, op=op) for result in results])
        outputs = [_like(r, tensor) for r, tensor in zip(results, tensors, strict=True)]
        return outputs if batched else outputs[0]

    def reduce(self, input: Any, dst: int, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:  # noqa: A002
        tensors = list(input) if batched else [input]
        results = [_host(tensor, copy=True) for tensor in tensors]
        self._count(results, sent=dst != self.rank, received=dst == self.rank)
        self._run([partial(dist.reduce, result, dst, op=op) for result in results])
        if dst != self.rank:
            return None
        outputs = [_like(r, tensor) for r, tensor in zip(results, tensors, strict=True)]
        return outputs if batched else outputs[0]

    def all_gather(self, tensor: Any) -> list[Any]:
        mine = _host(tensor)
        results = [torch.empty_like(mine) for _ in range(self.world_size)]
        self._count([mine], sent=True, received=True)
        self._run([partial(dist.all_gather, results, mine)])
        return [_like(result, tensor) for result in results]

    def gather(self, tensor: Any, dst: int) -> list[Any]:
        mine = _host(tensor)
        here = dst == self.rank
        results = [torch.empty_like(mine) for _ in range(self.world_size)] if here else []
        self._count([mine], sent=not here, received=here)
        self._run([partial(dist.gather, mine, results or None, dst)])
        return [_like(result, tensor) for result in results] if here else [None]

    def scatter(self, scatter_list: Any, src: int, size: Any = None, device: Any = None) -> Any:
        here = src == self.rank
        if here:
            parts = [_host(part) for part in scatter_list]
            result = torch.empty_like(parts[self.rank])
        else:
            shape = scatter_list[self.rank].size() if size is None else size
            parts, result = [], torch.empty(shape, dtype=torch.long)
        self._count([result], sent=here, received=not here)
        self._run([partial(dist.scatter, result, parts or None, src)])
        return result if device is None else result.to(device)

    def barrier(self) -> None:
        self._count([], sent=False, received=False)
        self._run([dist.barrier])

    # ------------------------------------------------- also with CrypTen's trusted third party

    def broadcast(self, input: Any, src: int, group: Any = None, batched: bool = False) -> Any:  # noqa: A002
        tensors = list(input) if batched else [input]
        results = [_host(tensor) for tensor in tensors]
        offline = group is not None and group is not self.main_group
        if offline:
            self._count_offline(sum(map(_nbytes, results)), sent=src == self.rank)
        else:
            self._count(results, sent=src == self.rank, received=src != self.rank)
        calls = [partial(dist.broadcast, result, src) for result in results]
        self._run(calls, self._other(src), group if offline else self.main_group)
        for result, tensor in zip(results, tensors, strict=True):
            if result.data_ptr() != tensor.data_ptr():
                tensor.copy_(_like(result, tensor))
        return input

    def send_obj(self, obj: Any, dst: int, group: Any = None) -> None:
        data = torch.from_numpy(np.frombuffer(pickle.dumps(obj), np.uint8).copy())
        self._count_object(data, dst, sent=True)
        with peer_errors(dst):
            parts = (torch.tensor([data.numel()]), data)
            target = self._default(group)
            works = [target.send([part], dist.get_group_rank(target, dst), 0) for part in parts]
        self.wait(dst, *works)

    def recv_obj(self, src: int, group: Any = None) -> Any:
        source = self._default(group)
        size = torch.zeros(1, dtype=torch.int64)
        # The third party has nothing to do between two prompts.
        limit = timedelta(seconds=IDLE_TIMEOUT) if self.rank == DEALER else self._limit
        with peer_errors(src, limit.total_seconds()):
            source.recv([size], dist.get_group_rank(source, src), 0).wait(limit)
        data = torch.empty(int(size), dtype=torch.uint8)
        with peer_errors(src):
            work = source.recv([data], dist.get_group_rank(source, src), 0)
        self.wait(src, work)
        self._count_object(data, src, sent=False)
        return crypten.restricted_loads(data.numpy().tobytes())

    def broadcast_obj(self, obj: Any, src: int, group: Any = None) -> Any:
        if self.rank == src:
            self.send_obj(obj, self.peer, group)
            return obj
        return self.recv_obj(src, group)

    def _default(self, group: Any) -> Any:
        return self.main_group if group is None else group

    def _other(self, src: int) -> int:
        if src != self.rank:
            return src
        return CLIENT if self.rank == DEALER else self.peer

    def _count_object(self, data: torch.Tensor, party: int, *, sent: bool) -> None:
        size = data.numel() + 8
        if DEALER in (party, self.rank):
            self._count_offline(size, sent=sent)
            return
        self.traffic.rounds += 1
        self.traffic.sent += size if sent else 0
        self.traffic.received += 0 if sent else size

    def _count_offline(self, size: int, *, sent: bool) -> None:
        if sent:
            self.traffic.offline_sent += size
        else:
            self.traffic.offline_received += size


def _meet(role: str, address: Address, timeout: float) -> dist.Store:
    """Wait for the other roles at the client's store."""
    deadline = time.monotonic() + timeout
    if role != ROLES[CLIENT]:
        _await_listener(address, deadline, timeout)
    try:
        store = dist.TCPStore(
            address.host,
            address.port,
            is_master=role == ROLES[CLIENT],
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        if role == ROLES[CLIENT]:
            reason = f"the client cannot listen at {address} ({_first_line(error)})"
            raise PartyError(f"{reason}; choose another port") from error
        reason = f"who listens at {address} is no client of mergec, or went away"
        raise PartyError(f"{reason} ({_first_line(error)}); choose another port") from error
    missing = [other for other in ROLES if other != role]
    try:
        if store.add(f"joined {role}", 1) > 1:
            raise PartyError(f"another {role} is at {address} already; end it, or choose another")
        while True:
            missing = [other for other in missing if not store.check([f"joined {other}"])]
            if not missing:
                return store
            if time.monotonic() > deadline:
                raise PartyError(_did_not_join(missing, address, timeout))
            time.sleep(_POLL)
    except RuntimeError as error:
        waiting = " and the ".join(missing)
        raise PartyError(
            f"the client went away while waiting for the {waiting}; start all three again"
        ) from error


def _await_listener(address: Address, deadline: float, timeout: float) -> None:
    """Wait until somebody listens: the store's own attempts go on beyond its timeout."""
    while True:
        try:
            with socket.create_connection((address.host, address.port), timeout):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PartyError(_did_not_join([ROLES[CLIENT]], address, timeout)) from error
        time.sleep(_POLL)


def _did_not_join(missing: Sequence[str], address: Address, timeout: float) -> str:
    commands = " and ".join(
        f"`python -m runtime.party --role {role} --rendezvous tcp://{address} --bundle DIR`"
        for role in missing
    )
    return (
        f"the {' and the '.join(missing)} did not join within {timeout:g} s; start "
        f"{'it' if len(missing) == 1 else 'them'} with {commands}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _nbytes(tensor: Any) -> int:
    return int(tensor.nelement()) * int(tensor.element_size())


def _host(tensor: Any, *, copy: bool = False) -> torch.Tensor:
    """A contiguous CPU tensor of the same data."""
    plain: torch.Tensor = tensor.data
    result = plain.cpu().contiguous()
    return result.clone() if copy and result.data_ptr() == plain.data_ptr() else result


def _like(result: torch.Tensor, tensor: Any) -> Any:
    """`result` where `tensor` is, and of its type."""
    if isinstance(tensor, crypten.CUDALongTensor):
        return crypten.CUDALongTensor(result.to(tensor.device))
    return result.to(tensor.device)
