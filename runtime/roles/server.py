"""The server as a service: one bundle, several clients at once, each in a session of its own.

All sessions share the weights, so a session adds only its share of the caches to the server's
memory.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from mergec.runtime.core.device import check_device
from mergec.runtime.core.memory import release_freed_memory
from mergec.runtime.core.spec import CLIENT, ROLES, SERVER
from mergec.runtime.engine.weights import take_weights
from mergec.runtime.program.bundle import TOKENIZER, load_bundle, words_watch
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.fork import prepare_to_fork, use_threads
from mergec.runtime.roles.observe import PartyMetrics, open_log
from mergec.runtime.roles.server_desk import ServerDesk
from mergec.runtime.roles.server_session import ServerSession
from mergec.runtime.roles.service import Service
from mergec.runtime.roles.settings import ServerSettings
from mergec.runtime.roles.worker import Parent
from mergec.runtime.session.public_blocks import PublicTexts, block_of_file, head_forms
from mergec.runtime.session.public_text import PublicText, tokens_of_file
from mergec.runtime.session.stores.folder import remove_unfinished, stores_below
from mergec.runtime.session.stores.format import StoreError
from mergec.runtime.session.stores.kept import digest_of
from mergec.runtime.session.stores.reader import Store
from mergec.runtime.session.text import VOCABULARY, Text
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import listen


def serve(settings: ServerSettings) -> bool:
    """Serve until SIGTERM or SIGINT; returns whether it was SIGINT."""
    check_device(settings.device)
    prepare_to_fork()
    log = open_log(ROLES[SERVER])
    intact = words_watch(settings.bundle)
    program = load_bundle(settings.bundle, ROLES[SERVER])
    public = _public_texts(settings, program)  # needs the weights as they are
    encoded = take_weights(program)
    # Without a key nothing outlasts a session, so nothing needs the digest to tell weights apart.
    digest = digest_of(encoded) if settings.store_key else ""
    release_freed_memory()  # else every session's process would copy it on reuse
    metrics = PartyMetrics(ROLES[SERVER])
    if settings.stores is not None:
        found = stores_below(settings.stores)
        log.info("cleaned", unfinished_stores=remove_unfinished(settings.stores))
        for place in found:
            try:
                Store.open(place, settings.store_key)
            except StoreError as error:  # affects one client; the others are served
                log.warning("a store that cannot be used", reason=str(error))
        metrics.watch(settings.stores)
    if settings.metrics is not None:
        metrics.serve(settings.metrics, log)
    for name, length in public.lengths().items() if public else ():
        log.info("public text", digest=name, tokens=length)
    with listen(settings.listen, settings.security) as listener:
        address = Address(*listener.getsockname()[:2])
        log.info("listening", address=str(address), program=program.manifest.program_hash)

        def work(connection: socket.socket, parent: Parent) -> None:
            use_threads(settings.threads)
            ServerSession(
                settings, program, encoded, digest, connection, parent, log, public, intact
            ).play()

        desk = ServerDesk(settings.limits, metrics)
        interrupted = Service(listener, work, desk, settings.grace).run()
    log.info("stopped")
    return interrupted


def _public_texts(settings: ServerSettings, program: RoleProgram) -> PublicTexts | None:
    """The public texts and blocks that clients may name; None if there are none."""
    if not settings.public and not settings.blocks:
        return None
    beside = settings.bundle.parent / ROLES[CLIENT] / TOKENIZER
    text = None
    if settings.tokenizer is not None:
        text = Text.given(settings.tokenizer)
    elif (beside / VOCABULARY).is_file():
        text = Text.load(beside)
    found = PublicTexts(program)
    for path in settings.public:
        for tokens in tokens_of_file(path, text):
            found.add(PublicText(len(tokens), tokens=tokens))
    blocks = [block_of_file(path, text) for path in settings.blocks]
    if blocks:
        begun: Sequence[Path | None] = settings.public or (None,)
        heads = [head for path in begun for head in head_forms(path, text)]
        found.add_blocks(heads, blocks)
    found.settle()
    return found
