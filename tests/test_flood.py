"""More connections than a role accepts: their number is bounded, and an honest one gets through."""

from __future__ import annotations

import socket
from typing import Any

import psutil

from mergec.runtime.roles import service
from mergec.runtime.roles.service import Desk, Service, Worker
from mergec.runtime.roles.worker import Parent
from tests.services import CONTEXT, START, wait_until

MOST = 4


class Open(Desk):
    """Has no rules."""

    def asked(self, worker: Worker, message: dict[str, Any]) -> None: ...

    def left(self, worker: Worker) -> None: ...


def work(connection: socket.socket, parent: Parent) -> None:
    """A session: a peer that sends something is known from then on, and gets a reply."""
    if connection.recv(1):
        parent.tell(kind="known")
        connection.sendall(b"!")
        connection.recv(1)


def listen(listener: socket.socket) -> None:
    service.MAX_STRANGERS = MOST
    service._STRANGER_TIME = 0.1
    Service(listener, work, Open(), 1.0).run()


def test_a_flood_of_connections_keeps_nobody_out() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        process = CONTEXT.Process(target=listen, args=(listener,), daemon=True)
        process.start()
        address = listener.getsockname()
    try:
        known = socket.create_connection(address)
        known.sendall(b"?")
        assert known.recv(1) == b"!"
        silent = [socket.create_connection(address) for _ in range(5 * MOST)]
        honest = socket.create_connection(address)
        honest.settimeout(START)
        honest.sendall(b"?")
        assert honest.recv(1) == b"!"
        # Beside the two that are known, no more strangers stay than may.
        wait_until(lambda: len(psutil.Process(process.pid).children()) <= MOST + 2)
        # The oldest gave way to the new ones; who is known never does.
        silent[0].settimeout(START)
        assert silent[0].recv(1) == b""
        known.sendall(b"?")
        for end in (known, honest, *silent):
            end.close()
    finally:
        process.terminate()
        process.join(30)
        process.kill()
