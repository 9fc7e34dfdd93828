"""At the client: has the dealer deal later answers, and stores its part of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mergec.runtime.core.context import constant_seed_of
from mergec.runtime.core.errors import PartyError, PromptError
from mergec.runtime.core.spec import CLIENT, ROLES
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.peers import Peers
from mergec.runtime.session.handshake import PREPARE, read_token
from mergec.runtime.session.hello import Hello
from mergec.runtime.session.requests import Plan, whole
from mergec.runtime.session.stores.format import Header, is_store
from mergec.runtime.session.stores.writer import StoreWriter
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.frames import MAX_BLOCK, Kind


def check_plan(plan: Plan, program: RoleProgram) -> None:
    """Raise PromptError if a program's answers cannot be precomputed by this plan."""
    if program.resends:
        raise PromptError(
            "answers of a program that resends its hidden state cannot be precomputed, as its "
            "last step is as long as the answer; use the dealer"
        )
    if plan.steady is not None and plan.drafts > program.manifest.speculate_up_to:
        raise PromptError(
            f"this program checks up to {program.manifest.speculate_up_to} drafts a step, "
            f"not {plan.drafts}; prepare for fewer, or compile with a larger speculate_up_to"
        )


def store_answers(
    peers: Peers,
    program: RoleProgram,
    plan: Plan,
    root: Path,
    key: bytes,
    on_answer: Callable[[int, int], object],
) -> tuple[Path, int]:
    """Store a plan's answers here and at the server; see `Connection.prepare`."""
    hello = Hello.of(ROLES[CLIENT], program.manifest)
    channel, fields = peers.admitted(hello, {"purpose": PREPARE})
    dealer, origin = peers.join(hello, read_token(fields, channel.peer))
    for other in peers.channels:
        other.send_json(Kind.PLAN, **plan.fields())
    store = channel.receive_json(Kind.ACCEPTED)[1].get("store")
    if not isinstance(store, str) or not is_store(store):
        raise PartyError("the server does not name its store; run `mergec prepare` again")
    header = Header(
        store,
        ROLES[CLIENT],
        program.manifest.program_hash,
        plan.answers,
        plan.prompt,
        plan.tokens,
        origin.salt.hex(),
        drafts=plan.drafts,
        pace=plan.pace,
    )
    static = constant_seed_of(origin.seed)
    with StoreWriter(root, header, key, origin.seed, static) as writer:
        for done in range(1, plan.answers + 1):
            peers.expect(plan.steps())
            while (received := _dealt(dealer, channel))[0] is Kind.BLOCK:
                writer.write(received[1])
            writer.end_answer()
            stored = {"answers": 0}
            while whole(stored, "answers", 0, plan.answers, channel.peer) < done:
                stored = channel.receive_json(Kind.STORED)[1]
            size = writer.size + whole(stored, "bytes", 0, 1 << 62, channel.peer)
            on_answer(done, size)
        channel.receive_json(Kind.DONE)
        writer.finish()
    return root / header.store, size


def _dealt(dealer: Channel, server: Channel) -> tuple[Kind, memoryview]:
    """The next block of an answer for a store, or the mark that ends it."""
    try:
        return dealer.receive_any((Kind.BLOCK, Kind.MARK), MAX_BLOCK)
    except PartyError:
        # The dealer ends when the server does, and the server says why: this raises.
        while True:
            server.receive_json(Kind.STORED)
