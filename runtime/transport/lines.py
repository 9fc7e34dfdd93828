"""Connections among roles that one parent starts on one machine; no port is opened."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from types import TracebackType

from mergec.runtime.core.spec import ROLES
from mergec.runtime.transport.channel import REPLY_TIMEOUT, Channel


class Lines:
    """A pair of sockets between every two roles, to be passed to the processes that run them.

    Plaintext is safe here: the sockets have no address, and no other process can access them. The
    parent leaves the context once all roles have started; from then on, each role notices if
    another one ends.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[str, str], socket.socket] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Lines:
        for one, other in combinations(ROLES, 2):
            pair = socket.socketpair()
            for end, key in zip(pair, ((one, other), (other, one)), strict=True):
                self._ends[key] = self._stack.enter_context(end)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def of(self, role: str) -> list[int]:
        """The descriptors that a role's process inherits: its ends, in the order of the others."""
        return [self._ends[role, other].fileno() for other in ROLES if other != role]


def take(
    role: str, descriptors: Sequence[int], timeout: float = REPLY_TIMEOUT
) -> dict[int, Channel]:
    """In the role's process: its channels, by the rank of the other role."""
    channels = {}
    others = (other for other in ROLES if other != role)
    for other, descriptor in zip(others, descriptors, strict=True):
        end = socket.socket(fileno=descriptor)
        end.set_inheritable(False)
        channels[ROLES.index(other)] = Channel(end, other, timeout)
    return channels
