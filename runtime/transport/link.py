"""The link between client and server: one call is one round."""

from __future__ import annotations

import hmac
import secrets
import select
import socket
from typing import Protocol

import torch

from runtime.errors import PartyError
from runtime.spec import CLIENT, ROLES, SERVER
from runtime.transport.channel import check_payload
from runtime.transport.communicator import CountingCommunicator
from runtime.transport.traffic import Traffic

_PORT_BYTES, _WORD_BYTES = 2, 32

_AT_ONCE = 1 << 16
"""Bytes that any socket buffer takes: they are sent without looking for the other's message."""


class Exchange(Protocol):
    """What a link offers, over whatever transport."""

    @property
    def traffic(self) -> Traffic: ...

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor: ...


class Link:
    """One party's end of a TCP connection of the two, which the communicator brings together.

    Gloo needs two messages and two thread switches for what is one here: on loopback, with the
    processes sharing two cores, a round takes a fraction of the time (docs/performance.md). Bytes
    and rounds are counted in the communicator's traffic, like those of CrypTen's own messages.
    """

    def __init__(self, communicator: CountingCommunicator) -> None:
        self._communicator = communicator
        self._peer = communicator.peer
        self._socket = _connect(communicator)

    @property
    def traffic(self) -> Traffic:
        return self._communicator.traffic

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor:
        """Send `outgoing` (1-D uint8 on the CPU) while receiving `incoming` bytes; one round.

        Both parties call this for every round, also for one in which a message goes one way only.
        """
        traffic = self._communicator.traffic
        reply = torch.empty(incoming, dtype=torch.uint8)
        unread = reply.numpy().data
        unsent = memoryview(b"")
        if outgoing is not None and outgoing.numel():
            check_payload(outgoing)
            unsent = outgoing.numpy().data
            traffic.sent += outgoing.numel()
        traffic.received += incoming
        traffic.rounds += 1
        try:
            if len(unsent) <= _AT_ONCE:
                self._socket.sendall(unsent)
                unsent = unsent[:0]
            while unsent:
                unsent, unread = self._both_ways(unsent, unread)
            while unread:
                count = self._socket.recv_into(unread)
                if not count:
                    raise ConnectionResetError
                unread = unread[count:]
        except TimeoutError as error:
            seconds = self._communicator.timeout
            raise PartyError(
                f"the {ROLES[self._peer]} sent nothing for {seconds:g} s; see what it is doing"
            ) from error
        except OSError as error:
            raise PartyError(
                f"the {ROLES[self._peer]} went away; see its own message, and start all three again"
            ) from error
        return reply

    def _both_ways(self, unsent: memoryview, unread: memoryview) -> tuple[memoryview, memoryview]:
        """Send and receive what is possible now: two full buffers must not wait for each other."""
        wanted = [self._socket] if unread else []
        readable, writable, _ = select.select(
            wanted, [self._socket], [], self._communicator.timeout
        )
        if not readable and not writable:
            raise TimeoutError
        if readable:
            count = self._socket.recv_into(unread)
            if not count:
                raise ConnectionResetError
            unread = unread[count:]
        if writable:
            unsent = unsent[self._socket.send(unsent[:_AT_ONCE]) :]
        return unsent, unread

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _connect(communicator: CountingCommunicator) -> socket.socket:
    """The client listens; the server comes with the word that it was given over the communicator.

    Neither the port nor the word says anything about the program, and both serve once.
    """
    timeout = communicator.timeout
    note = torch.zeros(_PORT_BYTES + _WORD_BYTES, dtype=torch.uint8)
    if communicator.rank == SERVER:
        communicator.wait(CLIENT, communicator.main_group.recv([note], CLIENT, 0))
        raw = bytes(note.numpy())
        port = int.from_bytes(raw[:_PORT_BYTES], "little")
        try:
            link = socket.create_connection((communicator.address.host, port), timeout)
            link.sendall(raw[_PORT_BYTES:])
        except OSError as error:
            raise PartyError("the client does not answer; start all three again") from error
    else:
        word = secrets.token_bytes(_WORD_BYTES)
        with socket.create_server((communicator.address.host, 0)) as listener:
            listener.settimeout(timeout)
            port = listener.getsockname()[1]
            raw = port.to_bytes(_PORT_BYTES, "little") + word
            note.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
            communicator.wait(SERVER, communicator.main_group.send([note], SERVER, 0))
            link = _accept(listener, word, timeout)
    link.settimeout(timeout)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def _accept(listener: socket.socket, word: bytes, timeout: float) -> socket.socket:
    """The first connection that brings the word; strangers are turned away."""
    while True:
        try:
            link, _ = listener.accept()
            link.settimeout(timeout)
            if hmac.compare_digest(link.recv(_WORD_BYTES, socket.MSG_WAITALL), word):
                return link
            link.close()
        except OSError as error:
            raise PartyError("the server does not answer; start all three again") from error
