"""How roles open a session with each other, on either side."""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

from mergec.runtime.core.errors import PartyError
from mergec.runtime.core.spec import DEALER, ROLES
from mergec.runtime.correlations.dpf import SALT_BYTES
from mergec.runtime.correlations.prg import SEED_BYTES
from mergec.runtime.session.hello import Hello, compare
from mergec.runtime.session.stores.kept import is_name
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.channel import HANDSHAKE_TIMEOUT, Channel
from mergec.runtime.transport.connect import Security, connect
from mergec.runtime.transport.frames import Kind

JOIN_TIMEOUT = 30.0
"""Seconds that a role waits until another one listens."""

TIMEOUT = 120.0
"""Seconds that a role waits for an expected message from a peer that gives no sign of life."""

IDLE_TIMEOUT = 1800.0
"""Seconds that a session may wait for its next prompt."""

SESSION, PREPARE, STORED = "session", "prepare", "stored"
"""Purposes of a client: answers, randomness for later ones, or answers from that randomness."""

_TOKEN_BYTES = 32


class Origin(NamedTuple):
    """Where a party's randomness comes from: its secret seed, and the session's public salt.

    The dealer draws both, see `correlations.dpf` for why it draws the salt alone.
    """

    seed: bytes
    salt: bytes

    def encode(self) -> bytes:
        return self.seed + self.salt


def receive_origin(dealer: Channel) -> Origin:
    """What the dealer sends a party first. Raises PartyError if it is not of this length."""
    data = bytes(dealer.receive(Kind.SEED, limit=SEED_BYTES + SALT_BYTES))
    if len(data) != SEED_BYTES + SALT_BYTES:
        raise PartyError("the dealer sent no seed and salt; install the same mergec everywhere")
    return Origin(data[:SEED_BYTES], data[SEED_BYTES:])


def greet(channel: Channel, mine: Hello, **more: Any) -> dict[str, Any]:
    """Open a session on a channel that this role connected; returns the peer's fields."""
    channel.send_json(Kind.HELLO, **mine.fields(), **more)
    _, fields = channel.receive_json(Kind.HELLO)
    compare(mine, Hello.read(fields, channel.peer), channel.peer)
    return fields


def be_greeted(channel: Channel, mine: Hello, roles: tuple[str, ...]) -> dict[str, Any]:
    """The other side of `greet`. Returns the peer's fields.

    On a channel without certificates, the peer's own claim of its role is used. With certificates
    the role is that of the certificate, whatever its name is, and a peer that claims another one is
    refused.
    """
    _, fields = channel.receive_json(Kind.HELLO, timeout=min(channel.timeout, HANDSHAKE_TIMEOUT))
    channel.send_json(Kind.HELLO, **mine.fields())
    if not channel.proven and fields.get("role") in roles:
        channel.peer = channel.name = fields["role"]
    compare(mine, Hello.read(fields, channel.peer), channel.peer)
    return fields


def join_dealer(
    address: Address,
    hello: Hello,
    security: Security,
    token: str,
    timeout: float,
    wait: float,
    **more: Any,
) -> tuple[Channel, Origin]:
    """Join a session at the dealer; returns the channel, and where its randomness comes from.

    token: the session's secret name. more: further fields for the dealer; the server sends the seed
    of its static masks as `masks`.
    """
    channel = connect(address, ROLES[DEALER], security, timeout, wait)
    try:
        greet(channel, hello, session=token, **more)
        return channel, receive_origin(channel)
    except PartyError as error:
        channel.fail(str(error))
        raise


def new_token() -> str:
    """A fresh secret name for a session: the dealer admits to the session whoever presents it."""
    return secrets.token_hex(_TOKEN_BYTES)


def read_token(fields: dict[str, Any], peer: str) -> str:
    """The session's name in a peer's fields; raises PartyError if it is malformed."""
    token = fields.get("session")
    if not isinstance(token, str) or len(token) != 2 * _TOKEN_BYTES or not token.isalnum():
        raise PartyError(f"the {peer} names no session; install the same mergec everywhere")
    return token


def read_masks(fields: dict[str, Any], peer: str) -> bytes | None:
    """The seed of static masks in a server's fields, if any; raises PartyError if malformed."""
    told = fields.get("masks")
    if told is None:
        return None
    if not is_name(told):
        raise PartyError(
            f"the {peer} sent a malformed seed of masks; install the same mergec everywhere"
        )
    return bytes.fromhex(told)
