"""How a server and a dealer are started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergec.runtime.session.handshake import IDLE_TIMEOUT, JOIN_TIMEOUT, TIMEOUT
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security


@dataclass(frozen=True)
class Limits:
    """What clients may request from a server.

    sessions: at once, of all clients together. client_sessions: at once per client, by the name in
    its certificate. queue: clients that may wait for a session. length: maximum tokens of prompt
    and answer together. tokens: maximum tokens of an answer. rate: maximum tokens of prompts and
    answers per client and minute; `mergec serve` sets one by default. For length, tokens and rate,
    0 sets no limit beyond the program's own. conversations: those whose caches a session keeps at
    once; each takes, at client and server, 16 bytes for each number that is cached of a token, and
    half as much at the dealer. ahead: bytes that a session may hold here for steps that are dealt
    before they are requested; 0 for no such steps.
    """

    sessions: int = 4
    client_sessions: int = 2
    queue: int = 16
    length: int = 0
    tokens: int = 0
    rate: int = 0
    conversations: int = 4
    ahead: int = 0


@dataclass(frozen=True)
class ServerSettings:
    """How a server is started. Times are in seconds.

    grace: time that running answers have to finish at shutdown.
    """

    bundle: Path
    listen: Address
    security: Security
    dealer: Address | None
    limits: Limits = Limits()
    device: str = "cpu"
    timeout: float = TIMEOUT
    idle_timeout: float = IDLE_TIMEOUT
    join_timeout: float = JOIN_TIMEOUT
    grace: float = 60.0
    metrics: Address | None = None
    threads: int = 1
    ranks: int = 1
    """Processes that share each session's weights and caches (`runtime.ranks`)."""
    stores: Path | None = None
    """Folder for precomputed randomness, if clients may store some; requires `store_key`."""
    store_key: bytes = b""
    """Key of the stores, and of static masks that outlast a session; empty if there is none."""
    store_bytes: int = 16 << 30
    """Maximum size of one store on disk, in bytes."""
    public: Sequence[Path] = ()
    """Files of public text that clients may begin their prompts with."""
    blocks: Sequence[Path] = ()
    """Files of public blocks that clients may combine behind such a text."""
    tokenizer: Path | None = None
    """The model's tokenizer, to read them with; by default that of a client's bundle beside."""


@dataclass(frozen=True)
class DealerSettings:
    """How a dealer is started. Times are in seconds; `sessions` counts those of all servers.

    expand_masks: expand the static masks of weights at each product instead of keeping them, which
    saves 8 bytes per weight and session and makes steps slower.
    """

    bundle: Path
    listen: Address
    security: Security
    sessions: int = 16
    device: str = "cpu"
    timeout: float = TIMEOUT
    idle_timeout: float = IDLE_TIMEOUT
    grace: float = 60.0
    metrics: Address | None = None
    threads: int = 1
    ranks: int = 1
    """Processes that share each session's static masks and those of its caches."""
    expand_masks: bool = False
