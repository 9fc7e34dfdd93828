"""An eavesdropper: forwards the bytes between client and server, and keeps a copy.

    python wiretap.py LISTEN TARGET FOLDER

Each connection to LISTEN is forwarded to TARGET. The bytes sent to TARGET are stored in
FOLDER/N.up, the bytes sent back in FOLDER/N.down: the contents of the TCP streams, complete and in
order, as a router sees them.
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

_BUFFER = 1 << 20


def listen(at: tuple[str, int], target: tuple[str, int], folder: Path) -> None:
    """Forward connections until killed."""
    with socket.create_server(at) as listener:
        host, port = listener.getsockname()
        print(f"listening {host}:{port}", flush=True)
        number = 0
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(target)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number += 1
            for source, sink, name in ((near, far, "up"), (far, near, "down")):
                file = folder / f"{number}.{name}"
                threading.Thread(target=_copy, args=(source, sink, file), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket, file: Path) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    with file.open("wb", buffering=0) as kept, suppress(OSError):
        while size := source.recv_into(buffer):
            kept.write(buffer[:size])
            sink.sendall(buffer[:size])
        sink.shutdown(socket.SHUT_WR)


def _address(text: str) -> tuple[str, int]:
    host, port = text.rsplit(":", 1)
    return host, int(port)


if __name__ == "__main__":
    listen(_address(sys.argv[1]), _address(sys.argv[2]), Path(sys.argv[3]))
