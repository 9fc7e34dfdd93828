"""Two roles that connect over a pair of sockets, for tests."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mergec.runtime.core.errors import MergecError
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.connect import Security, accept, connect, listen


def meet(
    client: Security, server: Security, roles: tuple[str, ...] = ("client",)
) -> tuple[Any, Any]:
    """The results of connecting at either side: a channel, or the error."""

    def attempt(call: Callable[[], Channel]) -> Channel | MergecError:
        try:
            return call()
        except MergecError as error:
            return error

    with listen(Address("127.0.0.1", 0), server) as listener, ThreadPoolExecutor(1) as pool:
        address = Address("127.0.0.1", listener.getsockname()[1])
        accepted = pool.submit(attempt, lambda: accept(listener.accept()[0], server, roles, 5.0))
        connected = attempt(lambda: connect(address, "server", client, 5.0, 5.0))
        return connected, accepted.result()
