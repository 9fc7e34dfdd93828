"""One role of a program as a process: `python -m runtime.party --role server --bundle DIR …`.

All three meet at the rendezvous, where the client listens, and compare versions, programs and modes
before anything is shared. Then the client says what to run, step by step. With `--json` a role
writes what happens to its standard output as JSON, one event a line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# Read when torch is imported: what goes wrong between parties is told by PartyError, in one line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

import torch

from runtime.bundle import TOKENIZER, load_bundle
from runtime.correlations.prg import SEED_BYTES, new_seed
from runtime.errors import MergecError, PartyError, PromptError
from runtime.generation import (
    MergecSession,
    Session,
    StepReport,
    StockSession,
    check_prompt,
    generate,
    measured,
)
from runtime.memory import keep_freed_memory, peak_bytes
from runtime.program import RoleProgram
from runtime.sampling import Draw, Sampling, draw_for
from runtime.session import draw_of
from runtime.spec import CLIENT, DEALER, FRACTIONAL_BITS, ROLES, SERVER

JOIN_TIMEOUT, REPLY_TIMEOUT = 30.0, 600.0
DEBUG = "MERGEC_DEBUG"
DEFAULT_RENDEZVOUS = "tcp://127.0.0.1:29500"

FIRST_PARTY_WARNING = (
    "WARNING: --insecure-first-party lets the client make all randomness: it can read every weight "
    "and value. This is no security at all; use it for debugging only."
)


@dataclass(frozen=True)
class Options:
    """What a role is started with."""

    role: str
    bundle: Path
    rendezvous: str = DEFAULT_RENDEZVOUS
    mode: str = "mergec"
    device: str = "cpu"
    join_timeout: float = JOIN_TIMEOUT
    timeout: float = REPLY_TIMEOUT
    insecure_first_party: bool = False
    prompt: tuple[int, ...] = ()
    max_tokens: int = 32
    sampling: Sampling = field(default_factory=Sampling)
    ignore_stop: bool = False


Emit = Callable[..., None]


def run_party(options: Options, emit: Emit) -> None:
    """Play a role from the first contact to the end of the session.

    emit(event, **fields): called with `loaded`, `joined`, `ready`, `token`, `step` and `end`.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise MergecError("there is no CUDA device here; use --device cpu")
    program = load_bundle(options.bundle, options.role)
    if options.role == ROLES[CLIENT]:
        check_prompt(options.prompt, options.max_tokens, program.manifest)
        draw_for(options.sampling, program.manifest, options.mode)
    emit("loaded", pid=os.getpid(), program=program.manifest["program_hash"])
    # CrypTen comes with the transport, and takes a while to import.
    from runtime import crypten_compat as crypten
    from runtime.transport.communicator import CountingCommunicator
    from runtime.transport.control import Control
    from runtime.transport.hello import Hello

    stock = options.mode == "crypten"
    third_party = stock and not options.insecure_first_party
    if stock:
        crypten.use_provider("dealer" if third_party else "insecure-first-party")
    communicator = CountingCommunicator.join(
        options.role,
        options.rendezvous,
        third_party=third_party,
        join_timeout=options.join_timeout,
        timeout=options.timeout,
    )
    control = Control(communicator)
    control.greet(
        Hello.of(options.role, program.manifest, options.mode, int(options.insecure_first_party))
    )
    emit("joined")
    if stock:
        _run_stock(options, program, communicator, control, emit)
    else:
        _run_mergec(options, program, communicator, control, emit)
    emit("end", peak_bytes=peak_bytes())
    communicator.leave()


def _run_mergec(
    options: Options, program: RoleProgram, communicator: Any, control: Any, emit: Emit
) -> None:
    from runtime.context import ClientContext, Context, DealerContext, ServerContext
    from runtime.executor import Executor
    from runtime.transport.gloo_stream import dealer_receiver, dealer_sender
    from runtime.transport.link import Link

    fixed = _fixed(program)
    context: Context
    if options.role == ROLES[DEALER]:
        client_seed, server_seed = new_seed(), new_seed()
        streams = {party: dealer_sender(communicator, party) for party in (CLIENT, SERVER)}
        for party, seed in ((CLIENT, client_seed), (SERVER, server_seed)):
            streams[party].write(torch.frombuffer(bytearray(seed), dtype=torch.uint8))
            streams[party].flush()
        context = DealerContext(
            client_seed, server_seed, streams[CLIENT], streams[SERVER], options.device, fixed
        )
        session = MergecSession(Executor(program, context, None), lambda: communicator.traffic)

        def flush() -> None:
            for stream in streams.values():
                stream.flush()

        _set_up(session, emit, flush)
        _serve(session, control, emit, flush)
        for stream in streams.values():
            stream.close()
        return
    source = dealer_receiver(communicator)
    seed = source.read(SEED_BYTES).numpy().tobytes()
    if options.role == ROLES[CLIENT]:
        context = ClientContext(seed, source, options.device, fixed)
    else:
        context = ServerContext(seed, source, options.device, fixed)
    link = Link(communicator)
    executor = Executor(program, context, link, Executor.take_weights(program))
    session = MergecSession(executor, lambda: communicator.traffic)
    _set_up(session, emit)
    if options.role == ROLES[CLIENT]:
        _ask(options, session, control, emit, (SERVER, DEALER))
    else:
        _serve(session, control, emit)


def _run_stock(
    options: Options, program: RoleProgram, communicator: Any, control: Any, emit: Emit
) -> None:
    from runtime import crypten_compat as crypten
    from runtime.transport.control import Opcode

    if options.role == ROLES[DEALER]:
        emit("ready")
        if options.insecure_first_party:
            while control.receive().opcode is not Opcode.END:
                pass
        else:
            crypten.serve_third_party()
        return
    from runtime.stock import StockExecutor

    crypten.start_party()
    session = StockSession(StockExecutor(program, options.device), lambda: communicator.traffic)
    _set_up(session, emit)
    if options.role == ROLES[SERVER]:
        _serve(session, control, emit)
        return
    _ask(options, session, control, emit, (SERVER,))
    if options.insecure_first_party:
        control.send(Opcode.END, to=(DEALER,))
    else:
        crypten.end_third_party()


def _set_up(session: Session, emit: Emit, done: Callable[[], object] = lambda: None) -> None:
    before, began = session.traffic(), time.perf_counter()
    session.setup()
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


def _ask(
    options: Options, session: Session, control: Any, emit: Emit, others: tuple[int, ...]
) -> None:
    """At the client: generate, telling the others of every step."""
    from runtime.transport.control import Opcode

    draw = draw_for(options.sampling, session.program.manifest, options.mode)
    stop = () if options.ignore_stop else tuple(session.program.manifest.get("stop_tokens", ()))
    generate(
        session,
        options.prompt,
        max_tokens=options.max_tokens,
        sampling=options.sampling,
        stop=stop,
        announce=lambda new, past: control.send(
            Opcode.STEP, new, past, draw.units, draw.top_k, to=others
        ),
        on_token=lambda token: emit("token", token=token),
        on_step=lambda report: emit("step", report=report.json()),
    )
    control.send(Opcode.END, to=others)


def _serve(
    session: Session, control: Any, emit: Emit, done: Callable[[], object] = lambda: None
) -> None:
    """At server and dealer: run what the client asks for, until it ends the session."""
    from runtime.transport.control import Opcode

    limit = session.program.manifest.get("max_length", 0)
    while True:
        message = control.receive()
        if message.opcode is Opcode.END:
            return
        if message.opcode is not Opcode.STEP:
            raise PartyError("the client gave up; see its own message")
        new, past, units, top_k = message.numbers[:4]
        if not session.allows(new, past) or (limit and new + past > limit):
            raise PartyError(
                f"the client asks for {new} tokens after {past}, which this program cannot run"
            )

        draw = draw_of(units, top_k, ROLES[CLIENT])

        def work(new: int = new, past: int = past, draw: Draw = draw) -> None:
            session.step(new, past, draw=draw)
            done()

        emit("step", report=measured(session, new, past, work).json())


def _fixed(program: RoleProgram) -> int:
    return int(program.manifest.get("fractional_bits", FRACTIONAL_BITS))


# ------------------------------------------------------------------------------ command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m runtime.party", description="Play one role of a compiled program."
    )
    parser.add_argument("--role", choices=ROLES, required=True)
    parser.add_argument("--bundle", type=Path, required=True, help="this role's bundle, or all")
    parser.add_argument("--rendezvous", default=DEFAULT_RENDEZVOUS, help="the client listens here")
    parser.add_argument("--mode", choices=("mergec", "crypten"), default="mergec")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--join-timeout", type=float, default=JOIN_TIMEOUT, metavar="SECONDS")
    parser.add_argument("--timeout", type=float, default=REPLY_TIMEOUT, metavar="SECONDS")
    parser.add_argument("--insecure-first-party", action="store_true", help="crypten, debugging")
    parser.add_argument("--json", action="store_true", help="events as JSON lines")
    client = parser.add_argument_group("client")
    client.add_argument("--prompt", help="text, by the tokenizer in the bundle")
    client.add_argument("--no-chat", action="store_true", help="no chat template")
    client.add_argument("--prompt-ids", help="token numbers, or - to read them from the input")
    client.add_argument("--max-tokens", type=int, default=32)
    client.add_argument("--temperature", type=float, default=0.0)
    client.add_argument("--top-k", type=int, default=0)
    client.add_argument("--top-p", type=float, default=1.0)
    client.add_argument("--seed", type=int)
    client.add_argument("--ignore-stop", action="store_true", help="go on after a stop token")
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    bundle = arguments.bundle
    if (bundle / arguments.role).is_dir():
        bundle = bundle / arguments.role
    if arguments.insecure_first_party and arguments.mode != "crypten":
        raise MergecError("--insecure-first-party is for --mode crypten only")
    return Options(
        role=arguments.role,
        bundle=bundle,
        rendezvous=arguments.rendezvous,
        mode=arguments.mode,
        device=arguments.device,
        join_timeout=arguments.join_timeout,
        timeout=arguments.timeout,
        insecure_first_party=arguments.insecure_first_party,
        prompt=_prompt(arguments, bundle) if arguments.role == ROLES[CLIENT] else (),
        max_tokens=arguments.max_tokens,
        sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed),
        ignore_stop=arguments.ignore_stop,
    )


def _prompt(arguments: argparse.Namespace, bundle: Path) -> tuple[int, ...]:
    if arguments.prompt is not None:
        text = _text(bundle)
        if not arguments.prompt.strip():
            raise PromptError("the prompt is empty; say something")
        return tuple(text.encode(arguments.prompt, text.has_chat and not arguments.no_chat))
    if arguments.prompt_ids is None:
        raise PromptError("the client needs a prompt; give --prompt or --prompt-ids")
    words = sys.stdin.read() if arguments.prompt_ids == "-" else arguments.prompt_ids
    try:
        return tuple(int(word) for word in words.replace(",", " ").split())
    except ValueError as error:
        raise PromptError("--prompt-ids takes whole numbers; say 17,4,9") from error


def _text(bundle: Path) -> Any:
    from runtime.text import Text

    return Text.load(bundle / TOKENIZER)


def _json_emitter() -> Emit:
    def emit(event: str, **fields: Any) -> None:
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()

    return emit


def _human_emitter(arguments: argparse.Namespace) -> Emit:
    """The client's answer to the output, all else to the error output."""
    from runtime.text import Stream

    stream = None
    if arguments.prompt is not None and arguments.role == ROLES[CLIENT]:
        bundle = arguments.bundle
        folder = bundle / arguments.role
        stream = Stream(_text(folder if folder.is_dir() else bundle), _write)

    def emit(event: str, **fields: Any) -> None:
        if event == "token" and stream is not None:
            stream.token(fields["token"])
        elif event == "token":
            _write(f"{fields['token']} ")
        elif event == "end":
            if stream is not None:
                stream.end()
            _write("\n" if arguments.role == ROLES[CLIENT] else "")
        elif event in ("loaded", "joined", "ready"):
            sys.stderr.write(f"{arguments.role}: {event}\n")

    return emit


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def play(argv: list[str] | None = None) -> int:
    """Run a command line; gives the exit code. Whatever goes wrong is told in one line."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.insecure_first_party:
            sys.stderr.write(FIRST_PARTY_WARNING + "\n")
        emit = _json_emitter() if arguments.json else _human_emitter(arguments)
        run_party(_options(arguments), emit)
        return 0
    except MergecError as error:
        _fail(arguments, type(error).__name__, str(error))
    except BrokenPipeError:
        pass  # Whoever started this role is gone.
    except Exception as error:  # noqa: BLE001  (our bug, still told in one line)
        said = " ".join(str(error).split())
        hint = f"set {DEBUG}=1 for the traceback and report it"
        _fail(arguments, "InternalError", f"internal error: {type(error).__name__}: {said}; {hint}")
    return 1


def main() -> NoReturn:
    """The process of a role. It never returns: connections may still wait in other threads."""
    # While a wait is inside gloo, Python would not notice Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    code = play()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _fail(arguments: argparse.Namespace, kind: str, message: str) -> None:
    line = " ".join(message.split())
    if os.environ.get(DEBUG):
        traceback.print_exc()
    if arguments.json:
        sys.stdout.write(json.dumps({"event": "error", "kind": kind, "message": line}) + "\n")
    else:
        sys.stderr.write(f"error: {line}\n")


if __name__ == "__main__":
    main()
