"""One role of a program as a process on this machine, started by `runtime.roles.local`.

The process inherits its connections to the two others (`runtime.transport.lines`), reads its job
from its standard input, as one line of JSON, and writes events to its standard output, one per
line. The roles compare versions, programs and modes before anything is shared. Then the client
tells the others what to run, step by step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from mergec.runtime.core.device import check_device
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import DEBUG, MergecError, PartyError
from mergec.runtime.core.memory import keep_freed_memory, peak_bytes
from mergec.runtime.core.meta import compute_shapes_alone
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER
from mergec.runtime.correlations.dpf import new_salt, salt_of
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.program.bundle import TOKENIZER, load_bundle
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.ranks.start import started
from mergec.runtime.session.conversations import STILL
from mergec.runtime.session.drafting import Speculation
from mergec.runtime.session.drafting.speculation import NONE
from mergec.runtime.session.generation import check_prompt, generate
from mergec.runtime.session.handshake import IDLE_TIMEOUT, Origin, receive_origin
from mergec.runtime.session.hello import Hello, compare
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.patience import patience, setup_patience
from mergec.runtime.session.public_blocks import compute_all, place_of, texts_of
from mergec.runtime.session.public_text import PublicText, check_text
from mergec.runtime.session.requests import branch, divide, read_step, turn, write_step
from mergec.runtime.session.sampling import Sampling, draw_for
from mergec.runtime.session.steps import Session, StepReport, measured
from mergec.runtime.session.stock_steps import StockSession
from mergec.runtime.session.text import Text
from mergec.runtime.transport.channel import REPLY_TIMEOUT, Channel
from mergec.runtime.transport.dealer_link import (
    BlockReader,
    ChannelBlockReader,
    ChannelBlockWriter,
    DealerReceiver,
    DealerSender,
)
from mergec.runtime.transport.frames import Kind
from mergec.runtime.transport.lines import take
from mergec.runtime.transport.pulse import BEAT, Pulse
from mergec.runtime.transport.traffic import Exchange, Traffic

if TYPE_CHECKING:
    from mergec.runtime.engine.executor import Executor
    from mergec.runtime.kernels.spread import Ranks


@dataclass(frozen=True)
class Options:
    """The job of a role. lines: file descriptors of its connections to the two others.

    join_timeout, timeout: seconds that the others may take to load, and then to send a message.
    `prompt` and the fields after it are for the client only.
    """

    role: str
    bundle: str
    lines: Sequence[int]
    mode: str = "mergec"
    device: str = "cpu"
    ranks: int = 1
    join_timeout: float = REPLY_TIMEOUT
    timeout: float = REPLY_TIMEOUT
    insecure_first_party: bool = False
    prompt: Sequence[int] = ()
    max_tokens: int = 32
    sampling: Sampling = field(default_factory=Sampling)
    ignore_stop: bool = False
    speculate: str = ""
    speculate_tokens: int | None = None
    speculate_fixed: float | None = None
    speculate_extra: int | None = None
    speculate_tree: bool = False
    prompt_piece: int = 0
    overlap: bool = True
    pads: int = 0
    public: Sequence[int] = ()
    """Tokens that the prompt begins with and that all roles are told of."""
    blocks: Sequence[Sequence[int]] = ()
    """Tokens of public blocks that follow these."""

    def json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Options:
        fields = json.loads(text)
        return cls(**{**fields, "sampling": Sampling(**fields["sampling"])})


Emit = Callable[..., None]
Channels = Mapping[int, Channel]


def run_party(options: Options, emit: Emit) -> None:
    """Run a role from the first contact to the end of the session.

    emit(event, **fields): called with `loaded`, `joined`, `ready`, `token`, `step` and `end`.
    """
    channels = take(options.role, options.lines, options.timeout)
    check_device(options.device)
    program = load_bundle(Path(options.bundle), options.role)
    if options.role == ROLES[CLIENT]:
        check_prompt(options.prompt, options.max_tokens, program.manifest, options.pads)
        draw_for(options.sampling, program.manifest, options.mode)
    texts = _public_texts(options, program)
    threads = max(1, torch.get_num_threads() // options.ranks)
    file = program.words_file
    with started(options.role, options.ranks, options.device, threads, file=file) as ranks:
        emit("loaded", pid=os.getpid(), program=program.manifest.program_hash)
        debug = int(options.insecure_first_party)
        greet(channels, Hello.of(options.role, program.manifest, options.mode, debug), options)
        emit("joined")
        pulse = Pulse()
        pulse.beats += [partial(channel.beat, BEAT / 2) for channel in channels.values()]
        for channel in channels.values():
            channel.expect(setup_patience(program, options.timeout))
        with pulse.working():
            if options.mode == "crypten":
                _run_stock(options, program, channels, emit)
            else:
                _run_mergec(options, program, texts, channels, emit, ranks)
    emit("end", peak_bytes=peak_bytes())


def greet(channels: Channels, hello: Hello, options: Options) -> None:
    """Compare versions, modes, programs and roles with the two others."""
    public = [text.digest for text in texts_of(options.public, options.blocks)]
    for channel in channels.values():
        channel.send_json(Kind.HELLO, **hello.fields(), public=public)
    for channel in channels.values():
        _, fields = channel.receive_json(Kind.HELLO, timeout=options.join_timeout)
        compare(hello, Hello.read(fields, channel.peer), channel.peer)
        if fields.get("public") != public:
            raise PartyError(f"the {channel.peer} has another public text; give all the same one")


def deal(
    program: RoleProgram,
    channels: Channels,
    device: str = "cpu",
    seeds: tuple[bytes, ...] = (),
) -> tuple[Executor, tuple[DealerSender, ...]]:
    """The dealer's executor, and its streams to client and server, which keep pace; sends both
    their seeds.

    seeds: the client's and the server's, to repeat a session word for word; fresh by default.
    """
    from mergec.runtime.core.context import DealerContext
    from mergec.runtime.engine.executor import Executor

    client_seed, server_seed = seeds or (new_seed(), new_seed())
    salt = salt_of(client_seed) if seeds else new_salt()
    for party, seed in ((CLIENT, client_seed), (SERVER, server_seed)):
        channels[party].send(Kind.SEED, Origin(seed, salt).encode())
    client, server = (DealerSender(ChannelBlockWriter(channels[p])) for p in (CLIENT, SERVER))
    client.keep_pace(server)
    more = {**program.manifest.arithmetic, "salt": salt}
    context = DealerContext(client_seed, server_seed, client, server, device, **more)
    return Executor(program, context, None), (client, server)


def compute(
    program: RoleProgram,
    channels: Channels,
    link: Exchange,
    device: str = "cpu",
    slowed: Callable[[BlockReader], BlockReader] = lambda blocks: blocks,
) -> tuple[Executor, DealerReceiver]:
    """A computing party's executor over `link`, and its stream from the dealer.

    slowed: wraps that stream, to emulate a network.
    """
    from mergec.runtime.core.context import ClientContext, ServerContext
    from mergec.runtime.engine.executor import Executor
    from mergec.runtime.engine.weights import take_weights

    dealer = channels[DEALER]
    seed, salt = receive_origin(dealer)
    blocks = slowed(ChannelBlockReader(dealer, IDLE_TIMEOUT))
    source = DealerReceiver(blocks, timeout=dealer.timeout)
    kind = ClientContext if program.role == ROLES[CLIENT] else ServerContext
    context = kind(seed, source, device, salt=salt, **program.manifest.arithmetic)
    return Executor(program, context, link, take_weights(program)), source


def _public_texts(options: Options, program: RoleProgram) -> list[PublicText]:
    """The public text as this role knows it; at the server, before its weights are encoded."""
    texts = texts_of(options.public, options.blocks)
    for text in texts:
        check_text(program, text)
    return compute_all(program, texts) if options.role == ROLES[SERVER] else texts


def _run_mergec(
    options: Options,
    program: RoleProgram,
    texts: Sequence[PublicText],
    channels: Channels,
    emit: Emit,
    ranks: Ranks | None,
) -> None:
    if options.role == ROLES[DEALER]:
        executor, streams = deal(program, channels, options.device)
        executor.context.ranks = ranks
        session = MergecSession(executor, Traffic)

        flush = streams[CLIENT].flush  # the server's keeps pace with it
        _set_up(session, texts, emit, flush)
        _serve(options, session, channels, emit, flush)
        for stream in streams:
            stream.close()
        return
    link = channels[SERVER if options.role == ROLES[CLIENT] else CLIENT]
    executor, source = compute(program, channels, link, options.device)
    executor.context.ranks = ranks
    session = MergecSession(executor, lambda: link.traffic)
    _set_up(session, texts, emit)
    if options.role == ROLES[CLIENT]:
        session.overlaps = options.overlap
        _ask(options, session, channels, (SERVER, DEALER), emit)
    else:
        _serve(options, session, channels, emit)
    # To a dealer that still sends, a party that leaves at once would look like one that failed.
    source.finish()


def _run_stock(options: Options, program: RoleProgram, channels: Channels, emit: Emit) -> None:
    # Importing CrypTen is slow.
    from mergec.runtime.crypten import compat as crypten
    from mergec.runtime.engine.stock import StockExecutor
    from mergec.runtime.transport.communicator import ChannelCommunicator

    communicator = ChannelCommunicator(options.role, channels, IDLE_TIMEOUT)
    communicator.install()
    crypten.use_provider("insecure-first-party" if options.insecure_first_party else "dealer")
    if options.role == ROLES[DEALER]:
        emit("ready")
        if options.insecure_first_party:
            channels[CLIENT].receive(Kind.END, limit=0)
        else:
            crypten.serve_third_party()
        return
    crypten.start_party()
    session = StockSession(StockExecutor(program, options.device), lambda: communicator.traffic)
    _set_up(session, (), emit)
    if options.role == ROLES[SERVER]:
        _serve(options, session, channels, emit)
        return
    _ask(options, session, channels, (SERVER,), emit)
    if options.insecure_first_party:
        channels[DEALER].send(Kind.END)
    else:
        crypten.end_third_party()


def _set_up(
    session: Session,
    texts: Sequence[PublicText],
    emit: Emit,
    done: Callable[[], object] = lambda: None,
) -> None:
    before, began = session.traffic(), time.perf_counter()
    session.setup()
    session.enter_public(texts)
    done()
    spent = session.traffic() - before
    emit(
        "ready",
        report=StepReport(
            "setup",
            0,
            0,
            time.perf_counter() - began,
            spent.sent,
            spent.received,
            spent.rounds,
            spent.offline,
        ).json(),
    )


def _text(options: Options) -> Text | None:
    """The tokenizer of the client's bundle, if something drafts for it."""
    folder = Path(options.bundle) / TOKENIZER
    return Text.load(folder) if options.speculate not in (NONE, "") and folder.is_dir() else None


def _ask(
    options: Options, session: Session, channels: Channels, told: Sequence[int], emit: Emit
) -> None:
    """At the client: generate, telling some of the others of every step."""
    others = [channels[party] for party in told]
    draw = draw_for(options.sampling, session.program.manifest, options.mode)
    speculation = Speculation.open(
        options.speculate,
        options.speculate_tokens,
        session.program.manifest,
        _text(options),
        fixed=options.speculate_fixed,
        extra=options.speculate_extra,
        tree=options.speculate_tree,
    )
    stop = () if options.ignore_stop else tuple(session.program.manifest.stop_tokens)

    known = texts_of(options.public, options.blocks)
    place = place_of(range(len(known))) if known else STILL
    session.turn_to(place)

    def announce(new: int, past: int) -> None:
        nonlocal place
        _expect(options, session, channels, new, past)
        for channel in others:
            channel.send(
                Kind.STEP, write_step(new, past, draw, place, session.split, session.branches)
            )
        place = STILL

    generate(
        session,
        options.prompt,
        max_tokens=options.max_tokens,
        sampling=options.sampling,
        stop=stop,
        announce=announce,
        speculation=speculation,
        cached=sum(text.length for text in known),
        piece=options.prompt_piece,
        pads=options.pads,
        on_token=lambda token: emit("token", token=token),
        on_step=lambda report: emit("step", report=report.json()),
    )
    for channel in others:
        channel.send(Kind.END)


def _expect(options: Options, session: Session, channels: Channels, new: int, past: int) -> None:
    """Let heartbeats of the others extend waits for as long as a step may take."""
    for channel in channels.values():
        channel.expect(patience(session.program, [(new, past)], options.timeout))


def _serve(
    options: Options,
    session: Session,
    channels: Channels,
    emit: Emit,
    done: Callable[[], object] = lambda: None,
) -> None:
    """At server and dealer: run the steps that the client requests, until it ends the session."""
    client = channels[CLIENT]
    limit = session.program.manifest.max_length
    while True:
        kind, payload = client.receive_any((Kind.STEP, Kind.END), timeout=IDLE_TIMEOUT)
        if kind is Kind.END:
            return
        new, past, draw, place, split, branches = read_step(payload, client.peer)
        turn(session, place, client.peer)
        branch(session, branches, new, past, split, client.peer)
        divide(session, split, new, client.peer)
        if not session.allows(new, past) or (limit and new + past > limit):
            raise PartyError(
                f"the client asks for {new} tokens after {past}, which this program cannot run"
            )
        _expect(options, session, channels, new, past)

        def work(new: int = new, past: int = past, draw: Draw = draw) -> None:
            session.step(new, past, draw=draw)
            done()

        emit("step", report=measured(session, new, past, work).json())


def _emit(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def play(job: str) -> int:
    """Run a role; returns the exit code. A failure is reported as one event."""
    try:
        run_party(Options.read(job), _emit)
        return 0
    except MergecError as error:
        _fail(type(error).__name__, str(error))
    except BrokenPipeError:
        pass  # the process that started this role has ended
    except Exception as error:  # noqa: BLE001  (a bug of ours, still reported in one line)
        said = " ".join(str(error).split())
        hint = f"set {DEBUG}=1 for the traceback and report it"
        _fail("InternalError", f"internal error: {type(error).__name__}: {said}; {hint}")
    return 1


def main() -> NoReturn:
    """The process of a role. It never returns: the dealer's stream may wait in another thread."""
    # The parent ends the run and reports it; three tracebacks would say less.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    compute_shapes_alone()
    code = play(sys.stdin.readline())
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _fail(kind: str, message: str) -> None:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    _emit("error", kind=kind, message=" ".join(message.split()))


if __name__ == "__main__":
    main()
