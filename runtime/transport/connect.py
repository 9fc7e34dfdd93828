"""Connections between roles: TLS 1.3 with certificates of a private authority on both sides.

A role trusts only the authority in its own folder, and a certificate names the role that its holder
may play. If there is a list of revoked certificates, it is read at each handshake. OpenSSL never
gets this file: it would trust every authority that it finds there. A role can also accept only the
keys that it was told of. Host names are not checked, so a role may move between machines. Plain TCP
is allowed only on loopback, and only if requested explicitly.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mergec.runtime.core.errors import MergecError, PartyError
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.certificates import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    check_certificate,
    find_folder,
    fingerprint,
    name_of,
    read_certificate,
    read_fingerprints,
    read_revoked,
    revoked_in,
    role_of,
)
from mergec.runtime.transport.channel import HANDSHAKE_TIMEOUT, Channel
from mergec.runtime.transport.frames import printable
from mergec.runtime.transport.sockets import explain, keep_alive

_POLL = 0.1
_BACKLOG = 64


class Security:
    """How a role's connections are protected: by certificates, or not at all (`plaintext`)."""

    def __init__(
        self,
        role: str,
        certificates: Path | None,
        *,
        plaintext: bool = False,
        revoked: Path | None = None,
        accepted: Sequence[str] = (),
    ) -> None:
        """certificates: the role's folder, or the folder that contains those of all roles.

        revoked: list of revoked certificates; default: the one in the role's folder, if any. It is
        read at each handshake; one that is there at the start has to stay. accepted: fingerprints
        of the only keys that peers may have; empty for any. Raises MergecError if neither or both
        of certificates and plaintext are given, or if the role's certificate is invalid.
        """
        self.role = role
        self.folder: Path | None = None
        self._revoked, self._accepted = revoked, read_fingerprints(accepted)
        if certificates is None:
            if not plaintext:
                raise MergecError(
                    "connections need certificates; give --certs DIR (`mergec certs` makes one), "
                    "or --plaintext for unencrypted connections on this machine"
                )
            if revoked is not None or accepted:
                raise MergecError("--revoked and --accept are for certificates; give --certs")
            return
        if plaintext:
            raise MergecError("--plaintext and --certs exclude each other; give one")
        self.folder = find_folder(certificates, role)
        check_certificate(self.folder, role, revoked=self._list())

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
        # One certificate, the one that lists of revoked certificates are checked against.
        authority = read_certificate(self.folder / AUTHORITY)
        context.load_verify_locations(cadata=authority.public_bytes(Encoding.DER))
        context.load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
        if listening:
            context.num_tickets = 0
        return context

    def revoked(self) -> frozenset[int]:
        """Serial numbers of revoked certificates; none without a list.

        Raises MergecError if the list cannot be read, is not the authority's, or is gone.
        """
        listed = self._list()
        if self.folder is None or listed is None:
            return frozenset()
        found = read_revoked(listed, read_certificate(self.folder / AUTHORITY))
        return frozenset(entry.serial_number for entry in found)

    def _list(self) -> Path | None:
        """The list of revoked certificates. One that was there is not forgotten if it is gone."""
        if self._revoked is None and self.folder is not None:
            self._revoked = revoked_in(self.folder)
        return self._revoked

    def refusal(self, peer: x509.Certificate, revoked: frozenset[int]) -> tuple[str, str]:
        """Why the holder of a certificate is not accepted, and what to do; empty if it is.

        revoked: what `revoked` returned.
        """
        if peer.serial_number in revoked:
            name = printable(name_of(peer))
            return f"the certificate of {name!r} was revoked", "ask the authority for another one"
        found = fingerprint(peer.public_key())
        if not self._accepted or found in self._accepted:
            return "", ""
        return (
            f"the {self.role} does not accept the key {found[:16]}… (--accept)",
            "give the keys of all peers, and check who this one is",
        )


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
    context, revoked = _settings(connection, security, listening=True)
    connection.settimeout(min(HANDSHAKE_TIMEOUT, timeout))
    peer = " or ".join(roles)
    with _one_line(peer):
        if context is None:
            return _channel(connection, roles[0], timeout)
        wrapped = context.wrap_socket(connection, server_side=True)
        certificate = _certificate(wrapped, peer)
        role, name = role_of(certificate), name_of(certificate)
        channel = _channel(wrapped, role or peer, timeout, name)
    if role not in roles:
        reason = f"only the {peer} may connect here, not {role or 'a party without a role'}"
        remedy = "give each role its own certificate"
    else:
        reason, remedy = security.refusal(certificate, revoked)
    if reason:
        channel.fail(reason)
        raise PartyError(f"{printable(name)!r} was rejected: {reason}; {remedy}")
    return channel


def connect(
    address: Address, role: str, security: Security, timeout: float, join_timeout: float
) -> Channel:
    """A channel to the `role` at `address`.

    Waits up to `join_timeout` seconds, or `timeout` if that is shorter, for the role to start.
    Raises PartyError if it does not answer, or if its certificate names another role.
    """
    security.check(address)
    connection = _await(address, role, min(join_timeout, timeout))
    context, revoked = _settings(connection, security, listening=False)
    connection.settimeout(min(HANDSHAKE_TIMEOUT, timeout))
    with _one_line(role):
        if context is None:
            return _channel(connection, role, timeout)
        wrapped = context.wrap_socket(connection)
        certificate = _certificate(wrapped, role)
        channel = _channel(wrapped, role, timeout, name_of(certificate))
    found = role_of(certificate)
    if found != role:
        reason = f"{address} is {found or 'a party without a role'}, not the {role}"
        remedy = "give each role its own certificate, and check the address"
    else:
        reason, remedy = security.refusal(certificate, revoked)
    if reason:
        channel.fail(reason)
        raise PartyError(f"{reason}; {remedy}")
    return channel


def _settings(
    connection: socket.socket, security: Security, *, listening: bool
) -> tuple[ssl.SSLContext | None, frozenset[int]]:
    """What a handshake needs; if it cannot be had, the connection is closed."""
    try:
        return security.context(listening=listening), security.revoked()
    except (MergecError, OSError):
        connection.close()
        raise


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


def _certificate(connection: ssl.SSLSocket, peer: str) -> x509.Certificate:
    """The peer's certificate, which OpenSSL has verified."""
    try:
        return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"")
    except ValueError as error:
        raise PartyError(
            f"the {peer} has a certificate that cannot be read; run `mergec certs`"
        ) from error


@contextmanager
def _one_line(peer: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PartyError(explain(error, peer)) from error
