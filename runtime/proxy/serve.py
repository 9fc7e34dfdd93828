"""Starts the endpoint on a local port."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from mergec.runtime.core.errors import MergecError, PartyError
from mergec.runtime.core.spec import CLIENT, ROLES
from mergec.runtime.proxy.app import make_app
from mergec.runtime.proxy.sessions import Sessions
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.observe import PartyMetrics, open_log
from mergec.runtime.transport.address import Address

_CONNECTIONS = 256
"""Most simultaneous connections, which bounds the memory that requests can use."""

_LOCAL_NAMES = ("127.0.0.1", "localhost", "::1", "[::1]")


@dataclass(frozen=True)
class ProxySettings:
    """How the endpoint is started.

    exposed: accept requests from other machines, which are not encrypted. origins: of other web
    pages that may send requests. sessions: most simultaneous sessions with the server. queue: most
    requests that may wait for a session. grace: seconds for answers to end at a shutdown. metrics:
    address of the Prometheus endpoint. stores: folder of stored randomness to use, if any. key:
    what requests must show; empty if they need none. speculate, speculate_tokens, speculate_fixed,
    speculate_extra, speculate_tree: as in `Connection.generate`.
    """

    listen: Address
    exposed: bool = False
    origins: Sequence[str] = ()
    sessions: int = 1
    queue: int = 16
    grace: float = 5.0
    metrics: Address | None = None
    stores: Path | None = None
    key: str = ""
    speculate: str = "none"
    speculate_tokens: int | None = None
    speculate_fixed: float | None = None
    speculate_extra: int | None = None
    speculate_tree: bool = False


def proxy(
    connect: Callable[[], Connection],
    settings: ProxySettings,
    on_ready: Callable[[str], object] = lambda _: None,
) -> None:
    """Answer local apps until SIGTERM. on_ready: called with the endpoint's URL.

    Raises MergecError if the address is not local and `exposed` is not set, and PartyError if it is
    in use.
    """
    address = settings.listen
    if not address.loopback and not settings.exposed:
        raise MergecError(
            f"{address} is reachable from other machines, so anyone could send requests in your "
            "name, and they are not encrypted; listen on 127.0.0.1, or pass --expose"
        )
    log = open_log(ROLES[CLIENT])
    metrics = PartyMetrics(ROLES[CLIENT])
    if settings.stores is not None:
        metrics.watch(settings.stores)
    with _listen(address) as listener:
        if settings.metrics is not None:
            metrics.serve(settings.metrics, log)
        drafting = {
            "speculate": settings.speculate,
            "speculate_tokens": settings.speculate_tokens,
            "speculate_fixed": settings.speculate_fixed,
            "speculate_extra": settings.speculate_extra,
            "speculate_tree": settings.speculate_tree,
        }
        sessions = Sessions(connect, settings.sessions, settings.queue, metrics, drafting)
        hosts = ("*",) if settings.exposed else (*_LOCAL_NAMES, address.host)
        app = make_app(sessions, hosts, settings.origins, log, settings.key)
        bound = Address(*listener.getsockname()[:2])
        log.info("listening", address=str(bound), model=sessions.program.manifest.model)
        if not address.loopback:
            reach = "whoever can read the network sees prompts and answers"
            if not settings.key:
                reach += ", and whoever reaches it can ask in your name; give --api-key-file"
            log.warning("exposed without encryption", address=str(bound), reason=reach)
        on_ready(f"http://{bound}")
        # uvicorn's own logs would contain paths and exceptions; ours contain lengths and reasons.
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=int(settings.grace),
        )
        # uvicorn re-raises the signal that ended it.
        signal.signal(signal.SIGTERM, lambda *_: None)
        uvicorn.Server(config).run(sockets=[listener])
    log.info("stopped")


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise PartyError(f"cannot listen at {address} ({reason}); choose another --port") from error
