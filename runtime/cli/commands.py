"""The party's commands: serve, deal, generate, chat, proxy, prepare, certs, doctor.

`compiler.cli` adds the commands that need a compiler. Whatever goes wrong is one line on the error
output, and an exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text as RichText

from mergec.runtime.core.errors import MergecError, PromptError
from mergec.runtime.core.version import VERSION

if TYPE_CHECKING:
    from mergec.runtime.roles.client import Connection
    from mergec.runtime.session.stores.store import Store
    from mergec.runtime.transport.address import Address
    from mergec.runtime.transport.connect import Security

DEBUG = "MERGEC_DEBUG"
FAILED, USAGE, INTERRUPTED = 1, 2, 130
SERVER_ADDRESS, DEALER_ADDRESS = "127.0.0.1:29600", "127.0.0.1:29700"

# typer brings its own copy of click since 0.2x, so the base of its errors is taken from typer.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="mergec",
    help="Compile a decoder into a program that two parties run together.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Device(StrEnum):
    """Where the parties compute."""

    cpu = "cpu"
    cuda = "cuda"


def _configure(context: typer.Context, file: Path | None) -> Path | None:
    """Take options from a TOML file; those on the command line go before."""
    if file is not None:
        try:
            found = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise MergecError(f"{file}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise MergecError(
                f"{file}: is not TOML ({error}); write lines as `sessions = 4`"
            ) from error
        known = {parameter.name for parameter in context.command.params}
        unknown = sorted(set(found) - known)
        if unknown:
            raise MergecError(
                f"{file}: {unknown[0]!r} is no option here; there are: "
                f"{', '.join(sorted(name for name in known if name and name[0] != '_'))}"
            )
        context.default_map = found
    return file


Config = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of options.", callback=_configure, is_eager=True),
]
DeviceOption = Annotated[Device, typer.Option(help="Where the parties compute.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.", min=1)]
Bundle = Annotated[Path, typer.Argument(help="This role's bundle, or the folder of all.")]
Certs = Annotated[Path | None, typer.Option(help="This role's certificates, or the folder of all.")]
Plaintext = Annotated[bool, typer.Option("--plaintext", help="No TLS; on loopback only.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for a message.", min=0.1)]
IdleTimeout = Annotated[float, typer.Option(help="Seconds a session may idle.", min=0.1)]
Grace = Annotated[float, typer.Option(help="Seconds for answers to end at a shutdown.", min=0)]
MetricsAt = Annotated[str | None, typer.Option("--metrics", help="host:port for Prometheus.")]
Threads = Annotated[int, typer.Option(help="Threads of each session.", min=1)]
ServerAt = Annotated[str, typer.Option("--server", help="host:port of the server.")]
DealerAt = Annotated[str, typer.Option("--dealer", help="host:port of the dealer.")]
StoreAt = Annotated[
    Path | None, typer.Option("--store", help="Take randomness from a store, not from the dealer.")
]
StoreKey = Annotated[
    Path | None, typer.Option(help="File with the stores' key; else MERGEC_STORE_KEY has it.")
]
Keep = Annotated[
    Path | None,
    typer.Option(help="Folder for hidden weights: a server with a --store-key sends them once."),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What to ask; - reads the input.")]
Temperature = Annotated[float, typer.Option(help="0 takes the best token.", min=0.0)]
TopK = Annotated[int, typer.Option(help="Sample from the k best; 0 for all.", min=0)]
TopP = Annotated[float, typer.Option(help="Sample from the best that sum to p.", min=0.0, max=1.0)]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling, not of masks.")]
Chat = Annotated[
    bool | None, typer.Option(help="Use the chat template; by default where there is one.")
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(f"mergec {VERSION}")
        raise typer.Exit


@app.command("certs")
def certs_command(
    folder: Annotated[Path, typer.Argument(help="Where to put them.")],
    client: Annotated[
        list[str] | None, typer.Option(help="Name of a client; may be given more than once.")
    ] = None,
    days: Annotated[int, typer.Option(help="How long they are valid.", min=1, max=3650)] = 365,
) -> None:
    """Make an authority, and certificates of all roles."""
    from mergec.runtime.transport.certificates import AUTHORITY_KEY, make_certificates

    made = make_certificates(folder, tuple(client or ("client",)), days)
    for place in made:
        out.print(str(place), soft_wrap=True)
    secret = folder / AUTHORITY_KEY
    err.print(f"give each role its own folder; keep {secret} to yourself", soft_wrap=True)


@app.command("doctor")
def doctor_command(
    bundle: Annotated[Path | None, typer.Argument(help="A role's bundle to check, too.")] = None,
    certs: Certs = None,
    listen: Annotated[
        list[str] | None, typer.Option(help="host:port that should be free; may be repeated.")
    ] = None,
) -> None:
    """Check this machine, a bundle, and certificates."""
    from mergec.runtime.cli.doctor import BAD, POOR, examine

    styles = {BAD: "red", POOR: "yellow"}
    bad = 0
    for finding in examine(bundle, certs, tuple(listen or ())):
        line = f"{finding.state:<5} {finding.what}: {finding.said}"
        out.print(RichText(line, style=styles.get(finding.state, "")), soft_wrap=True)
        bad += finding.state == BAD
    if bad:
        raise MergecError(f"{bad} of these will not do")


@app.command("serve")
def serve_command(
    bundle: Bundle,
    listen: Annotated[str, typer.Option(help="host:port for clients.")] = SERVER_ADDRESS,
    dealer: DealerAt = DEALER_ADDRESS,
    certs: Certs = None,
    plaintext: Plaintext = False,
    sessions: Annotated[int, typer.Option(help="Sessions at once.", min=1)] = 4,
    client_sessions: Annotated[int, typer.Option(help="Of one client.", min=1)] = 2,
    queue: Annotated[int, typer.Option(help="Clients that may wait.", min=0)] = 16,
    length: Annotated[int, typer.Option(help="Most tokens, with the prompt; 0: any.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer; 0: any.", min=0)] = 0,
    rate: Annotated[int, typer.Option(help="Tokens per client, minute; 0: any.", min=0)] = 0,
    device: DeviceOption = Device.cpu,
    threads: Threads = 1,
    timeout: Timeout = 120.0,
    idle_timeout: IdleTimeout = 1800.0,
    grace: Grace = 60.0,
    metrics: MetricsAt = None,
    stores: Annotated[
        Path | None, typer.Option(help="Folder for randomness that clients have dealt ahead.")
    ] = None,
    store_key: Annotated[
        Path | None,
        typer.Option(
            help="File with the key of stores, and of static masks that clients may keep hidden "
            "weights for; MERGEC_STORE_KEY for stores alone."
        ),
    ] = None,
    store_bytes: Annotated[int, typer.Option(help="Most bytes of a store.", min=1)] = 16 << 30,
    _config: Config = None,
) -> None:
    """Serve a model to clients, until SIGTERM."""
    from mergec.runtime.roles.server import Limits, ServerSettings, serve
    from mergec.runtime.session.stores.store import read_key

    interrupted = serve(
        ServerSettings(
            bundle=_folder(bundle, "server"),
            listen=_address(listen),
            security=_security("server", certs, plaintext),
            dealer=_address(dealer) if dealer else None,
            limits=Limits(sessions, client_sessions, queue, length, tokens, rate),
            device=device.value,
            timeout=timeout,
            idle_timeout=idle_timeout,
            grace=grace,
            metrics=_address(metrics) if metrics else None,
            threads=threads,
            stores=stores,
            store_key=read_key(store_key) if stores or store_key else b"",
            store_bytes=store_bytes,
        )
    )
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command("deal")
def deal_command(
    bundle: Bundle,
    listen: Annotated[str, typer.Option(help="host:port for both parties.")] = DEALER_ADDRESS,
    certs: Certs = None,
    plaintext: Plaintext = False,
    sessions: Annotated[int, typer.Option(help="Sessions at once, of all servers.", min=1)] = 16,
    threads: Threads = 1,
    timeout: Timeout = 120.0,
    idle_timeout: IdleTimeout = 1800.0,
    grace: Grace = 60.0,
    metrics: MetricsAt = None,
    _config: Config = None,
) -> None:
    """Deal correlated randomness to sessions, until SIGTERM."""
    from mergec.runtime.roles.dealer import DealerSettings, deal

    interrupted = deal(
        DealerSettings(
            bundle=_folder(bundle, "dealer"),
            listen=_address(listen),
            security=_security("dealer", certs, plaintext),
            sessions=sessions,
            timeout=timeout,
            idle_timeout=idle_timeout,
            grace=grace,
            metrics=_address(metrics) if metrics else None,
            threads=threads,
        )
    )
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command("prepare")
def prepare_command(
    bundle: Bundle,
    store: Annotated[Path, typer.Option("--store", help="Folder for this party's stores.")],
    tokens: Annotated[int, typer.Option(help="Tokens to prepare for, in all.", min=1)],
    answer: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 64,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt's first step.", min=1)] = 16,
    store_key: StoreKey = None,
    server: ServerAt = SERVER_ADDRESS,
    dealer: DealerAt = DEALER_ADDRESS,
    certs: Certs = None,
    plaintext: Plaintext = False,
    timeout: Timeout = 120.0,
    _config: Config = None,
) -> None:
    """Store randomness, so that answers need no dealer.

    A stored answer takes a prompt of at least --prompt tokens: these in one step, each further one
    in a step of its own, at the expense of --answer.
    """
    from mergec.runtime.session.handshake import Plan
    from mergec.runtime.session.stores.store import read_key

    key = read_key(store_key)
    plan = Plan(-(-tokens // answer), prompt, answer)
    connection = _connection(bundle, server, dealer, None, certs, plaintext, Device.cpu, timeout)
    with err.status("dealing") as status:
        place, size = connection.prepare(
            plan,
            store,
            key,
            lambda done, size: status.update(
                f"{done} of {plan.answers} answers, {size / 1e6:.0f} MB"
            ),
        )
    out.print(
        f"{place}: {plan.answers} answers of {answer} tokens; at both parties {size / 1e6:.1f} MB, "
        f"{size / plan.answers / answer / 1e6:.3f} MB a token",
        soft_wrap=True,
    )


@app.command("generate")
def generate_command(
    bundle: Bundle,
    prompt: Prompt,
    server: ServerAt = SERVER_ADDRESS,
    dealer: DealerAt = DEALER_ADDRESS,
    store: StoreAt = None,
    store_key: StoreKey = None,
    keep: Keep = None,
    certs: Certs = None,
    plaintext: Plaintext = False,
    ids: Annotated[bool, typer.Option("--ids", help="The prompt is token numbers.")] = False,
    max_tokens: MaxTokens = 32,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    chat: Chat = None,
    device: DeviceOption = Device.cpu,
    timeout: Timeout = 120.0,
    _config: Config = None,
) -> None:
    """Ask a server once, and stream the answer."""
    from mergec.runtime.session.sampling import Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    opened = _store(store, store_key)
    with _connection(
        bundle, server, dealer, opened, certs, plaintext, device, timeout, keep
    ) as connection:
        asked = _numbers(text) if ids else connection.encode(text, chat)
        sampling = Sampling(temperature, top_k, top_p, seed)
        _, stopped = _answer(
            connection, asked, show_ids=ids, max_tokens=max_tokens, sampling=sampling
        )
    if stopped:
        raise KeyboardInterrupt


@app.command("chat")
def chat_command(
    bundle: Bundle,
    server: ServerAt = SERVER_ADDRESS,
    dealer: DealerAt = DEALER_ADDRESS,
    store: StoreAt = None,
    store_key: StoreKey = None,
    keep: Keep = None,
    certs: Certs = None,
    plaintext: Plaintext = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: DeviceOption = Device.cpu,
    timeout: Timeout = 120.0,
    _config: Config = None,
) -> None:
    """Talk to a server. Ctrl-C ends an answer; an empty line or Ctrl-D, the chat."""
    from mergec.runtime.session.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    turns: list[dict[str, str]] = []
    opened = _store(store, store_key)
    with _connection(
        bundle, server, dealer, opened, certs, plaintext, device, timeout, keep
    ) as connection:
        while True:
            try:
                said = out.input("[bold]> [/bold]" if out.is_terminal else "").strip()
            except EOFError:
                return
            if not said:
                return
            turns.append({"role": "user", "content": said})
            try:
                asked = connection.encode_chat(turns)
                text, _ = _answer(connection, asked, max_tokens=max_tokens, sampling=sampling)
                turns.append({"role": "assistant", "content": text})
            except MergecError as error:
                turns.pop()
                err.print(RichText(f"error: {error}", style="red"), soft_wrap=True)


@app.command("proxy")
def proxy_command(
    bundle: Bundle,
    server: ServerAt = SERVER_ADDRESS,
    dealer: DealerAt = DEALER_ADDRESS,
    store: StoreAt = None,
    store_key: StoreKey = None,
    keep: Keep = None,
    certs: Certs = None,
    plaintext: Plaintext = False,
    host: Annotated[str, typer.Option(help="Where to listen for apps.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    expose: Annotated[bool, typer.Option("--expose", help="Let other machines ask.")] = False,
    origin: Annotated[
        list[str] | None, typer.Option(help="Web page elsewhere that may ask, as https://host.")
    ] = None,
    sessions: Annotated[int, typer.Option(help="Sessions with the server.", min=1)] = 1,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", min=0)] = 16,
    device: DeviceOption = Device.cpu,
    timeout: Timeout = 120.0,
    grace: Grace = 5.0,
    metrics: MetricsAt = None,
    _config: Config = None,
) -> None:
    """Offer OpenAI's interface and a chat page, here."""
    if store is not None and sessions > 1:
        raise MergecError("a store serves one session at a time; leave --sessions out")
    from mergec.runtime.proxy.serve import ProxySettings, proxy
    from mergec.runtime.transport.address import Address

    proxy(
        lambda: _connection(
            bundle,
            server,
            dealer,
            _store(store, store_key),
            certs,
            plaintext,
            device,
            timeout,
            keep,
        ),
        ProxySettings(
            listen=Address(host, port),
            exposed=expose,
            origins=origin or (),
            sessions=sessions,
            queue=queue,
            grace=grace,
            metrics=_address(metrics) if metrics else None,
            stores=store,
        ),
        lambda url: err.print(f"chat at {url}, point apps at {url}/v1", soft_wrap=True),
    )


def _answer(
    connection: Connection, asked: list[int], *, show_ids: bool = False, **options: Any
) -> tuple[str, bool]:
    """Stream an answer, and say what it took; gives its text, and whether Ctrl-C ended it.

    Ctrl-C ends it after the step under way, so that the session stays; a second one, at once.
    """
    from mergec.runtime.session.text import Stream

    stream = Stream(connection.text, write) if connection.text and not show_ids else None
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    reports: list[Any] = []
    try:
        with waiting("the parties compute the first token") as first:
            show = first(write)
            for token in connection.generate(asked, **options):
                reports += token.reports
                if stream is None:
                    show(f"{token.token} ")
                else:
                    show("")
                    stream.token(token.token)
                if stopped:
                    break
        text = stream.end() if stream is not None else ""
    finally:
        signal.signal(signal.SIGINT, before)
        if reports:
            write("\n")  # also where the answer fails: an error starts a line of its own
    seconds, count = sum(r.seconds for r in reports), len(reports)
    online = sum(r.sent + r.received for r in reports)
    rounds = sum(r.rounds for r in reports)
    err.print(
        f"{count} steps, {seconds / count:.2f} s, {online / count / 1e6:.2f} MB and "
        f"{rounds / count:.0f} rounds each",
        style="dim",
    )
    return text, stopped


def _connection(
    bundle: Path,
    server: str,
    dealer: str,
    store: Store | None,
    certs: Path | None,
    plaintext: bool,
    device: Device,
    timeout: float,
    keep: Path | None = None,
) -> Connection:
    from mergec.runtime.roles.client import Connection

    return Connection(
        _folder(bundle, "client"),
        server=_address(server),
        dealer=_address(dealer) if store is None else None,
        store=store,
        security=_security("client", certs, plaintext),
        device=device.value,
        timeout=timeout,
        keep=keep,
        on_wait=lambda place: err.print(f"waiting for a place, {place} in the queue", style="dim"),
    )


def _store(place: Path | None, key: Path | None) -> Store | None:
    """A store, or the first one in a folder of several that has something left."""
    if place is None:
        return None
    from mergec.runtime.session.stores.store import Store, read_key, stores_below

    secret = read_key(key)
    found = [Store.open(inner, secret) for inner in stores_below(place)]
    usable = [store for store in found if store.left()]
    return usable[0] if usable else (found[0] if found else Store.open(place, secret))


def _folder(bundle: Path, role: str) -> Path:
    return bundle / role if (bundle / role).is_dir() else bundle


def _address(text: str) -> Address:
    from mergec.runtime.transport.address import Address

    return Address.parse(text)


def _security(role: str, certs: Path | None, plaintext: bool) -> Security:
    from mergec.runtime.transport.connect import Security

    return Security(role, certs, plaintext=plaintext)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise PromptError("--ids takes whole numbers; say --prompt '17 4 9'") from error


def write(text: str) -> None:
    """Print without a line's end, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def waiting(what: str) -> Iterator[Callable[[Callable[[str], None]], Callable[[str], None]]]:
    """A spinner until the first text comes; gives what to wrap the writing of text in."""
    spinner = err.status(what)

    def first(write: Callable[[str], None]) -> Callable[[str], None]:
        def stop_and_write(text: str) -> None:
            spinner.stop()
            write(text)

        return stop_and_write

    if err.is_terminal:
        spinner.start()
    try:
        yield first
    finally:
        spinner.stop()


def run(arguments: list[str] | None = None) -> int:
    """Run a command line; gives the exit code. Whatever goes wrong is one line on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    debug = bool(os.environ.get(DEBUG))
    try:
        code = app(args=arguments, prog_name="mergec", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer makes an exit code of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except MergecError as error:
        return _fail(str(error), FAILED, debug)
    except _UsageError as error:
        return _fail(f"{_message(error)}; see `mergec --help`", USAGE, debug)
    except (KeyboardInterrupt, typer.Abort):
        err.print("stopped", style="red")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "mergec":
            return _fail(f"internal error: {error}; set {DEBUG}=1 for more", FAILED, debug)
        web = (error.name or "").split(".")[0] in ("fastapi", "pydantic", "starlette", "uvicorn")
        hint = f"install mergec[{'proxy' if web else 'compile'}]"
        return _fail(f"the package {error.name!r} is needed here; {hint}", FAILED, debug)
    except Exception as error:  # noqa: BLE001  (our bug, still told in one line)
        kind = type(error).__name__
        said = " ".join(str(error).split())
        text = f"internal error: {kind}: {said}; set {DEBUG}=1 for the traceback and report it"
        return _fail(text, FAILED, debug)


def _message(error: Any) -> str:
    return str(error.format_message()).rstrip(".")


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first, *details = message.strip().splitlines() or ["unknown"]
    err.print(RichText(f"error: {first}", style="red"), soft_wrap=True)
    for line in details:  # the nodes of the user's graph that are to blame, and why
        err.print(RichText(line), soft_wrap=True)
    return code


def main() -> None:
    """The console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
