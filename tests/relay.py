"""A connection between two roles that fails at a chosen frame; over plain TCP."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from mergec.runtime.transport.address import Address
from mergec.runtime.transport.frames import Kind

HEADER = struct.Struct("!BxxxIQ")
UP, DOWN = "up", "down"
"""From the role that connected, and to it."""

Spot = tuple[str, Kind, int]
"""The n-th frame of a kind in a direction, counted from the previous spot."""


@dataclass
class Pair:
    """An incoming connection, and the outgoing one that belongs to it."""

    near: socket.socket
    far: socket.socket
    silent: bool = False
    pause: float = 0.0

    def reset(self) -> None:
        """Reset the connection, as a machine does that does not know of it."""
        for end in (self.near, self.far):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RD)
                end.close()

    def silence(self) -> None:
        """Forward nothing any more, with both ends open."""
        self.silent = True

    def trickle(self) -> None:
        """From here on, forward an occasional byte."""
        self.pause = 0.2


class Relay:
    """Forwards frames; at the armed spot it first causes the fault."""

    def __init__(self) -> None:
        self.target = Address("127.0.0.1", 1)
        self.fired = threading.Event()
        self.delay = 0.0
        """Seconds of delay per frame."""
        self._spots: list[Spot] = []
        self._fault: Callable[[Pair], object] = Pair.silence
        self._pairs: list[Pair] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address(*self._listener.getsockname()[:2])
        threading.Thread(target=self._serve, daemon=True).start()

    def arm(self, spots: list[Spot], fault: Callable[[Pair], object]) -> None:
        """Cause `fault` once the spots have been passed, just before the last one's frame."""
        with self._lock:
            self._spots, self._fault = list(spots), fault
            self.fired.clear()

    def disarm(self) -> None:
        """End all connections, including faulty ones."""
        with self._lock:
            self._spots = []
        for pair in self._pairs:
            pair.reset()
        self._pairs = []

    def close(self) -> None:
        self._listener.close()
        self.disarm()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection((self.target.host, self.target.port))
                except OSError:
                    near.close()
                    continue
                pair = Pair(near, far)
                self._pairs.append(pair)
                for way, one, other in ((UP, near, far), (DOWN, far, near)):
                    threading.Thread(
                        target=self._copy, args=(pair, way, one, other), daemon=True
                    ).start()

    def _copy(self, pair: Pair, way: str, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while (head := read(one, HEADER.size)) is not None:
                kind, _, length = HEADER.unpack(head)
                payload = read(one, length)
                if payload is None:
                    break
                self._look(pair, way, kind)
                if pair.silent:
                    return
                time.sleep(self.delay)
                if not pair.pause:
                    other.sendall(head + payload)
                    continue
                for byte in head + payload:
                    time.sleep(pair.pause)
                    other.sendall(bytes([byte]))
        with suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def _look(self, pair: Pair, way: str, kind: int) -> None:
        with self._lock:
            if not self._spots or self._spots[0][:2] != (way, kind):
                return
            _, due, count = self._spots[0]
            self._spots[0] = (way, due, count - 1)
            if count > 1:
                return
            self._spots.pop(0)
            if self._spots:
                return
            fault = self._fault
        fault(pair)
        self.fired.set()


def read(connection: socket.socket, count: int) -> bytes | None:
    """Exactly `count` bytes; None if they do not arrive."""
    data = bytearray()
    while len(data) < count:
        got = connection.recv(min(count - len(data), 1 << 16))
        if not got:
            return None
        data += got
    return bytes(data)
