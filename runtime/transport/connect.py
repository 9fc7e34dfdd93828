"""Connections between roles: TLS 1.3 with certificates of a private authority on both sides.

A role trusts only the authority in its own folder, and a certificate names the role that its holder
may play. If there is a list of revoked certificates, OpenSSL checks it at each handshake. A role
can also accept only the keys that it was told of. Host names are not checked, so a role may move
between machines. Plain TCP is allowed only on loopback, and only if requested explicitly.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509

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
    read_fingerprints,
    revoked_in,
    role_of,
)
from mergec.runtime.transport.channel import (
    HANDSHAKE_TIMEOUT,
    Channel,
    explain,
    keep_alive,
    printable,
)

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
        read at each handshake. accepted: fingerprints of the only keys that peers may have; empty
        for any. Raises MergecError if neither or both of certificates and plaintext are given, or
        if the role's certificate is invalid.
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
        check_certificate(self.folder, role, revoked=revoked)

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
        revoked = self._revoked or revoked_in(self.folder)
        if revoked is not None:
            try:
                context.load_verify_locations(revoked)
            except OSError as error:  # nobody is let in who might be on it
                raise MergecError(
                    f"{revoked}: cannot be read as a list of revoked certificates; "
                    "`mergec certs revoke` writes it"
                ) from error
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        if listening:
            context.num_tickets = 0
        return context

    def refusal(self, peer: x509.Certificate) -> str:
        """Why the holder of a certificate is not accepted; empty if it is."""
        found = fingerprint(peer.public_key())
        if not self._accepted or found in self._accepted:
            return ""
        return f"the {self.role} does not accept the key {found[:16]}… (--accept)"


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
        certificate = _certificate(wrapped, peer)
        role, name = role_of(certificate), name_of(certificate)
        channel = _channel(wrapped, role or peer, timeout, name)
    if role not in roles:
        reason = f"only the {peer} may connect here, not {role or 'a party without a role'}"
        remedy = "give each role its own certificate"
    else:
        reason, remedy = security.refusal(certificate), "add it if it should be"
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
    context = security.context(listening=False)
    connection = _await(address, role, min(join_timeout, timeout))
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
        reason, remedy = security.refusal(certificate), "check the address, and who runs it"
    if reason:
        channel.fail(reason)
        raise PartyError(f"{reason}; {remedy}")
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
