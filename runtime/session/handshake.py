"""What roles do at the start of a session, whichever side they are on."""

from __future__ import annotations

import secrets
from typing import Any

from mergec.runtime.core.errors import PartyError
from mergec.runtime.core.spec import DEALER, ROLES
from mergec.runtime.correlations.prg import SEED_BYTES
from mergec.runtime.session.hello import Hello, compare
from mergec.runtime.session.stores.kept import is_name
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.channel import HANDSHAKE_TIMEOUT, Channel, Kind
from mergec.runtime.transport.connect import Security, connect

JOIN_TIMEOUT = 30.0
"""Seconds that a role waits for another to listen."""

TIMEOUT = 120.0
"""Seconds that a role waits for a message that is due."""

IDLE_TIMEOUT = 1800.0
"""Seconds that a session may wait for its next prompt."""

SESSION, PREPARE, STORED = "session", "prepare", "stored"
"""What a client wants: answers, randomness for later ones, or answers by such."""

_TOKEN_BYTES = 32


def greet(channel: Channel, mine: Hello, **more: Any) -> dict[str, Any]:
    """Open a session on a channel that this role connected; gives what the other says of itself."""
    channel.send_json(Kind.HELLO, **mine.fields(), **more)
    _, fields = channel.receive_json(Kind.HELLO)
    compare(mine, Hello.read(fields, channel.peer), channel.peer)
    return fields


def be_greeted(channel: Channel, mine: Hello, roles: tuple[str, ...]) -> dict[str, Any]:
    """The other side of `greet`. Without certificates the peer's role is what it says it is."""
    _, fields = channel.receive_json(Kind.HELLO, timeout=min(channel.timeout, HANDSHAKE_TIMEOUT))
    channel.send_json(Kind.HELLO, **mine.fields())
    if channel.name == channel.peer and fields.get("role") in roles:
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
) -> tuple[Channel, bytes]:
    """This party's channel to the dealer, and its seed there for the session named by `token`.

    more: what else to tell the dealer; the server, a seed of static masks as `masks`.
    """
    channel = connect(address, ROLES[DEALER], security, timeout, wait)
    try:
        greet(channel, hello, session=token, **more)
        return channel, bytes(channel.receive(Kind.SEED, limit=SEED_BYTES))
    except PartyError as error:
        channel.fail(str(error))
        raise


def new_token() -> str:
    """A session's secret name: who shows it to the dealer is given a part in the session."""
    return secrets.token_hex(_TOKEN_BYTES)


def read_token(fields: dict[str, Any], peer: str) -> str:
    """The session's name in what a peer said."""
    token = fields.get("session")
    if not isinstance(token, str) or len(token) != 2 * _TOKEN_BYTES or not token.isalnum():
        raise PartyError(f"the {peer} names no session; install the same mergec everywhere")
    return token


def read_masks(fields: dict[str, Any], peer: str) -> bytes | None:
    """The seed of static masks that a server tells the dealer, if it does."""
    told = fields.get("masks")
    if told is None:
        return None
    if not is_name(told):
        raise PartyError(f"the {peer} names masks that cannot be; install the same mergec")
    return bytes.fromhex(told)
