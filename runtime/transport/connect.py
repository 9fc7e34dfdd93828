"""Connections between roles: TLS 1.3 with certificates of a private authority on both sides.

A role trusts only the authority in its own folder, and a certificate names the role that its holder
may play. Host names are not checked, so a role may move between machines. Plain TCP is allowed only
on loopback, and only if requested explicitly.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergec.runtime.core.errors import MergecError, PartyError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.certificates import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    ROLE_URI,
    check_certificate,
)
from mergec.runtime.transport.channel import HANDSHAKE_TIMEOUT, Channel, explain, keep_alive

_POLL = 0.1
_BACKLOG = 64


class Security:
    """How a role's connections are protected: by certificates, or not at all (`plaintext`)."""

    def __init__(self, role: str, certificates: Path | None, *, plaintext: bool = False) -> None:
        """certificates: the role's folder, or the folder that contains those of all roles.

        Raises MergecError if neither or both are given, or if the role's certificate is invalid.
        """
        self.role = role
        self.folder: Path | None = None
        if certificates is None:
            if not plaintext:
                raise MergecError(
                    "connections need certificates; give --certs DIR (`mergec certs` makes one), "
                    "or --plaintext for unencrypted connections on this machine"
                )
            return
        if plaintext:
            raise MergecError("--plaintext and --certs exclude each other; give one")
        inner = certificates / role
        self.folder = inner if inner.is_dir() else certificates
        check_certificate(self.folder, role)

    def check(self, address: Address) -> None:
        """Raise MergecError for plaintext connections across a network."""
        if self.folder is None and not address.loopback:
            raise MergecError(
                f"{address} is not on this machine, and --plaintext is for loopback; give --certs"
            )

    def context(self, *, listening: bool) -> ssl.SSLContext | None:
        """OpenSSL's settings; None for plaintext."""
        if self.folder is None:
            return None
        side = ssl.PROTOCOL_TLS_SERVER if listening else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.folder / AUTHORITY)
        context.load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
        if listening:
            context.num_tickets = 0
        return context


def listen(address: Address, security: Security) -> socket.socket:
    """A listening socket. Raises PartyError that names a port already in use."""
    security.check(address)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PartyError(
            f"cannot listen at {address} ({reason}); choose another --listen"
        ) from error


def accept(
    connection: socket.socket,
    security: Security,
    roles: Sequence[str],
    timeout: float,
) -> Channel:
    """The channel of an incoming connection, after it has proven to be one of `roles`.

    Raises PartyError if it is not. Without certificates, the peer is assumed to be the first of
    `roles` until it says otherwise.
    """
    context = security.context(listening=True)
    connection.settimeout(min(HANDSHAKE_TIMEOUT, timeout))
    peer = " or ".join(roles)
    with _one_line(peer):
        if context is None:
            return _channel(connection, roles[0], timeout)
        wrapped = context.wrap_socket(connection, server_side=True)
        role, name = _identity(wrapped)
        channel = _channel(wrapped, role or peer, timeout, name)
    if role not in roles:
        reason = f"only the {peer} may connect here, not {role or 'a party without a role'}"
        channel.fail(reason)
        raise PartyError(f"{name!r} was rejected: {reason}; give each role its own certificate")
    return channel


def connect(
    address: Address, role: str, security: Security, timeout: float, join_timeout: float
) -> Channel:
    """A channel to the `role` at `address`.

    Waits up to `join_timeout` seconds, or `timeout` if that is shorter, for the role to start.
    Raises PartyError if it does not answer, or if its certificate names another role.
    """
    security.check(address)
    context = security.context(listening=False)
    connection = _await(address, role, min(join_timeout, timeout))
    connection.settimeout(min(HANDSHAKE_TIMEOUT, timeout))
    with _one_line(role):
        if context is None:
            return _channel(connection, role, timeout)
        wrapped = context.wrap_socket(connection)
        found, name = _identity(wrapped)
        channel = _channel(wrapped, role, timeout, name)
    if found != role:
        reason = f"{address} is {found or 'a party without a role'}, not the {role}"
        channel.fail(reason)
        raise PartyError(f"{reason}; give each role its own certificate, and check the address")
    return channel


def _await(address: Address, role: str, join_timeout: float) -> socket.socket:
    deadline = time.monotonic() + join_timeout
    while True:
        try:
            wait = min(HANDSHAKE_TIMEOUT, max(deadline - time.monotonic(), _POLL))
            return socket.create_connection((address.host, address.port), wait)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            unknown = isinstance(error, (socket.gaierror, OverflowError))
            if unknown or time.monotonic() > deadline:
                raise PartyError(
                    f"the {role} does not answer at {address} ({reason}); start it, or correct the "
                    "address"
                ) from error
        time.sleep(_POLL)


def _channel(
    connection: socket.socket, role: str, timeout: float, name: str | None = None
) -> Channel:
    """`name`: that in the peer's certificate; None if there is no certificate."""
    keep_alive(connection, timeout)
    return Channel(connection, role, timeout, name or "", proven=name is not None)


def _identity(connection: ssl.SSLSocket) -> tuple[str, str]:
    """Role and name in the peer's certificate, which OpenSSL has verified."""
    found = connection.getpeercert() or {}
    names: Any = found.get("subjectAltName", ())
    roles = [v.removeprefix(ROLE_URI) for k, v in names if k == "URI" and v.startswith(ROLE_URI)]
    subject: Any = found.get("subject", ())
    common = [value for part in subject for key, value in part if key == "commonName"]
    name = common[0] if common else ""
    return (roles[0] if len(roles) == 1 and roles[0] in ROLES else ""), name


@contextmanager
def _one_line(peer: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PartyError(explain(error, peer)) from error
