"""Sockets: how the kernel notices that a peer is gone, and what a failed TLS handshake means."""

from __future__ import annotations

import socket
import ssl

_KEEP_IDLE, _KEEP_EVERY, _KEEP_TRIES = 30, 10, 3

_REASONS = {
    "CERTIFICATE_EXPIRED": "says that this party's certificate has expired; run `mergec certs`, "
    "or set the clocks",
    "UNKNOWN_CA": "trusts another authority; use certificates of one `mergec certs`",
    "CERTIFICATE_REQUIRED": "requires a certificate; give --certs",
    "BAD_CERTIFICATE": "does not accept this party's certificate; run `mergec certs`, or set the "
    "clocks",
    "WRONG_VERSION_NUMBER": "does not use TLS; start both with --certs, or neither",
    "HTTP_REQUEST": "does not use TLS; it is a web browser",
}
"""What OpenSSL's reasons mean here, by a part of their name."""


def keep_alive(connection: socket.socket, timeout: float) -> None:
    """Let the kernel detect a peer that is cut off, even while neither side sends."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE") and hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        idle = max(1, min(_KEEP_IDLE, int(timeout)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
        every = max(1, min(_KEEP_EVERY, int(timeout)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEP_TRIES)
        connection.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * max(1.0, timeout))
        )


def explain(error: OSError, peer: str) -> str:
    """What went wrong in a TLS handshake, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message
        if "not yet valid" in said or "expired" in said:
            remedy = "run `mergec certs`, or set the clocks"
        else:
            remedy = "use certificates of one `mergec certs`"
        return f"the {peer} has an invalid certificate ({said}); {remedy}"
    if isinstance(error, TimeoutError):
        return f"the {peer} did not finish the handshake in time; check what it is doing"
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        reason = error.reason or ""
        for part, meaning in _REASONS.items():
            if part in reason:
                return f"the {peer} {meaning}"
        return f"the {peer} does not use TLS as expected ({reason or error}); check the address"
    return f"the {peer} went away in the handshake; see its error message, and try again"
