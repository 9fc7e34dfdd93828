"""How a server and a dealer are started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergec.runtime.session.handshake import IDLE_TIMEOUT, JOIN_TIMEOUT, TIMEOUT
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security


@dataclass(frozen=True)
class Limits:
    """What clients may ask of a server; 0 is no limit beyond the program's own.

    sessions: at once, of all clients. client_sessions: of one client, by the name in its
    certificate. queue: clients that may wait for a place. length: prompt and answer together.
    tokens: of an answer. rate: tokens of prompts and answers per client and minute.
    """

    sessions: int = 4
    client_sessions: int = 2
    queue: int = 16
    length: int = 0
    tokens: int = 0
    rate: int = 0


@dataclass(frozen=True)
class ServerSettings:
    """How a server is started. Times in seconds; grace: for answers to end at a shutdown."""

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
    stores: Path | None = None
    """Where randomness dealt ahead is kept, if clients may have some; then there is a key, too."""
    store_key: bytes = b""
    """Of the stores, and of static masks that outlast a session."""
    store_bytes: int = 16 << 30
    """What one store may take on disk."""


@dataclass(frozen=True)
class DealerSettings:
    """How a dealer is started. Times in seconds; `sessions` counts those of all servers."""

    bundle: Path
    listen: Address
    security: Security
    sessions: int = 16
    timeout: float = TIMEOUT
    idle_timeout: float = IDLE_TIMEOUT
    grace: float = 60.0
    metrics: Address | None = None
    threads: int = 1
