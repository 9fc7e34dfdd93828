"""The dealer as a service: deals to both parties of each session what `runtime.core.context` needs.

The client and the server of a session each connect on their own and show the same secret name,
which the server chose and told the client. The dealer deals a step only when both request it.
"""

from __future__ import annotations

import socket

from mergec.runtime.core.device import check_device
from mergec.runtime.core.spec import DEALER, ROLES
from mergec.runtime.program.bundle import load_bundle
from mergec.runtime.roles.dealer_desk import DealerDesk
from mergec.runtime.roles.dealer_session import DealerSession
from mergec.runtime.roles.fork import prepare_to_fork, use_threads
from mergec.runtime.roles.observe import Metrics, open_log
from mergec.runtime.roles.service import Service
from mergec.runtime.roles.settings import DealerSettings
from mergec.runtime.roles.worker import Parent
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import listen


def deal(settings: DealerSettings) -> bool:
    """Deal until SIGTERM or SIGINT; returns whether it was SIGINT."""
    check_device(settings.device)
    prepare_to_fork()
    log = open_log(ROLES[DEALER])
    program = load_bundle(settings.bundle, ROLES[DEALER])
    metrics = Metrics(ROLES[DEALER])
    if settings.metrics is not None:
        metrics.serve(settings.metrics, log)
    with listen(settings.listen, settings.security) as listener:
        log.info("listening", address=_name(listener), program=program.manifest.program_hash)

        def work(connection: socket.socket, parent: Parent) -> None:
            use_threads(settings.threads)
            DealerSession(settings, program, connection, parent, log).play()

        desk = DealerDesk(settings.sessions, metrics, settings.timeout)
        interrupted = Service(listener, work, desk, settings.grace).run()
    log.info("stopped")
    return interrupted


def _name(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return str(Address(host, port))
