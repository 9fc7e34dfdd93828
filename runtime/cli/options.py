"""Options of the commands, each defined once; those that belong together are a dataclass."""

from __future__ import annotations

import functools
import inspect
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mergec.runtime.cli.console import err
from mergec.runtime.core.errors import MergecError

if TYPE_CHECKING:
    from mergec.runtime.roles.client import Connection
    from mergec.runtime.session.ahead import AheadPlan
    from mergec.runtime.session.sampling import Sampling
    from mergec.runtime.session.stores.reader import Store
    from mergec.runtime.transport.address import Address
    from mergec.runtime.transport.connect import Security

SERVER_ADDRESS, DEALER_ADDRESS = "127.0.0.1:29600", "127.0.0.1:29700"


class Device(StrEnum):
    """Where the parties compute."""

    cpu = "cpu"
    cuda = "cuda"


def _configure(context: typer.Context, file: Path | None) -> Path | None:
    """Read options from a TOML file; those on the command line take precedence."""
    if file is not None:
        try:
            found = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise MergecError(f"{file}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise MergecError(
                f"{file}: is not valid TOML ({error}); write lines like `sessions = 4`"
            ) from error
        known = {parameter.name for parameter in context.command.params} - {"config"}
        unknown = sorted(set(found) - known)
        if unknown:
            raise MergecError(
                f"{file}: unknown option {unknown[0]!r}; this command has: "
                f"{', '.join(sorted(name for name in known if name))}"
            )
        context.default_map = found
    return file


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file of options; the command line takes precedence.",
        callback=_configure,
        is_eager=True,
    ),
]
DeviceOption = Annotated[Device, typer.Option(help="Device that the parties compute on.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum number of tokens to generate.", min=1)]
Bundle = Annotated[
    Path, typer.Argument(help="Bundle of this role, or the folder of all three bundles.")
]
Certs = Annotated[
    Path | None,
    typer.Option(help="Certificates of this role, or the folder that has those of all roles."),
]
Plaintext = Annotated[
    bool, typer.Option("--plaintext", help="Connect without TLS; on loopback only.")
]
Revoked = Annotated[
    Path | None,
    typer.Option(
        help="List of revoked certificates; by default revoked.pem beside the certificate, if any."
    ),
]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        help="Accept only peers whose keys have these fingerprints; may be repeated. "
        "`mergec certs show` prints them."
    ),
]
Timeout = Annotated[
    float, typer.Option(help="Seconds of silence after which a peer is gone.", min=0.1)
]
IdleTimeout = Annotated[float, typer.Option(help="Seconds that a session may be idle.", min=0.1)]
Grace = Annotated[
    float, typer.Option(help="Seconds that running answers have to finish at shutdown.", min=0)
]
MetricsAt = Annotated[
    str | None, typer.Option("--metrics", help="host:port to serve Prometheus metrics at.")
]
Ranks = Annotated[
    int,
    typer.Option(
        help="Processes of this machine that share a party's weights and caches; with --device "
        "cuda each has a GPU of its own.",
        min=1,
    ),
]
Threads = Annotated[int, typer.Option(help="Threads per session.", min=1)]
ServerAt = Annotated[str, typer.Option("--server", help="host:port of the server.")]
DealerAt = Annotated[str, typer.Option("--dealer", help="host:port of the dealer.")]
StoreAt = Annotated[
    Path | None,
    typer.Option("--store", help="Use stored randomness from this folder instead of the dealer."),
]
StoreKey = Annotated[
    Path | None,
    typer.Option(help="File with the key of the stores; by default MERGEC_STORE_KEY holds it."),
]
Keep = Annotated[
    Path | None,
    typer.Option(
        help="Folder to keep the masked weights in: a server with a --store-key sends them once."
    ),
]
Expected = Annotated[
    str | None,
    typer.Option(
        "--expect",
        metavar="HASH",
        help="Refuse a bundle whose program hash, in full, is not this one.",
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        help="Your own tokenizer instead of the bundle's: tokenizer.json, or a folder that has it."
    ),
]
FixedLength = Annotated[
    bool,
    typer.Option(
        "--fixed-length",
        help="Run --max-tokens steps in any case, so that their number says nothing.",
    ),
]
Prompt = Annotated[
    str, typer.Option("--prompt", "-p", help="The prompt; `-` reads it from standard input.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 chooses the most likely token. By default as the model's generation settings say.",
        min=0.0,
    ),
]
TopK = Annotated[
    int | None, typer.Option(help="Sample from the k most likely tokens; 0: all.", min=0)
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the most likely tokens whose probabilities sum to p.", min=0.0, max=1.0
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Sample from tokens at least p times as likely as the likeliest.", min=0.0, max=1.0
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1, tokens that occurred become less likely.", min=0.0),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling; it does not affect masks.")]
PublicPrompt = Annotated[
    Path | None,
    typer.Option(
        "--public-prompt",
        help="File of public text: what prompts begin with, as the system message where there is a "
        "chat template. The server must know it, too; it takes no steps.",
    ),
]
PublicBlocks = Annotated[
    list[Path] | None,
    typer.Option(
        "--public-block",
        help="File of public text behind that of --public-prompt, such as an example; may be "
        "repeated. Blocks do not see each other, so this is another function than the model's. "
        "The server must know each; they take no steps.",
    ),
]
Reuse = Annotated[
    bool,
    typer.Option(
        help="Continue the caches of an earlier prompt that begins like this one. The server and "
        "the dealer see which one, and how much both have in common."
    ),
]
PromptPiece = Annotated[
    int,
    typer.Option(
        help="Most tokens of a prompt in one step, to bound the memory of long prompts; 0: any.",
        min=0,
    ),
]
Overlap = Annotated[
    bool,
    typer.Option(
        help="Let the two halves of a prompt overlap where the network is slow: one is computed "
        "while the other's messages travel."
    ),
]
PadPrompt = Annotated[
    int | None,
    typer.Option(
        "--pad-prompt",
        metavar="N",
        help="Pad prompts to the next multiple of N tokens, or to as many as fit, so that server "
        "and dealer learn no more of their lengths; answers stay the same, and no prompt continues "
        "another one's caches. Needs a program that was compiled with --pad-prompt.",
        min=1,
    ),
]
PrepareDisk = Annotated[
    str,
    typer.Option(
        "--prepare-disk",
        metavar="SIZE",
        help="Most bytes of one session that this party holds of what the dealer deals ahead, in "
        "memory and in TMPDIR: 2GB, 500MB.",
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(help="Apply the chat template; by default if the model has one."),
]


def read_blocks(paths: Sequence[Path] | None) -> list[str]:
    """The texts of public blocks, in the order of their files."""
    from mergec.runtime.session.public_text import read_public_text

    return [read_public_text(path) for path in paths or ()]


@dataclass(frozen=True, kw_only=True)
class PartyOptions:
    """Options of every command that speaks for a party."""

    bundle: Bundle
    certs: Certs = None
    plaintext: Plaintext = False
    revoked: Revoked = None
    accept: Accept = None
    timeout: Timeout = 120.0
    config: Config = None

    def folder(self, role: str) -> Path:
        """The bundle of `role`."""
        inner = self.bundle / role
        return inner if inner.is_dir() else self.bundle

    def security(self, role: str) -> Security:
        """How `role` secures its connections."""
        from mergec.runtime.transport.connect import Security

        return Security(
            role,
            self.certs,
            plaintext=self.plaintext,
            revoked=self.revoked,
            accepted=tuple(self.accept or ()),
        )


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(PartyOptions):
    """Options of a role that serves sessions: `serve` and `deal`."""

    threads: Threads = 1
    ranks: Ranks = 1
    idle_timeout: IdleTimeout = 1800.0
    grace: Grace = 60.0
    metrics: MetricsAt = None


@dataclass(frozen=True, kw_only=True)
class ClientOptions(PartyOptions):
    """Options of a client that connects to a server and to its dealer."""

    server: ServerAt = SERVER_ADDRESS
    dealer: DealerAt = DEALER_ADDRESS
    expect: Expected = None

    def connection(self) -> Connection:
        """A connection, not yet open, that takes its randomness from the dealer."""
        return self._connection(dealer=address(self.dealer))

    def _connection(self, **more: Any) -> Connection:
        from mergec.runtime.core.meta import compute_shapes_alone
        from mergec.runtime.roles.client import Connection

        compute_shapes_alone()
        return Connection(
            self.folder("client"),
            server=address(self.server),
            security=self.security("client"),
            timeout=self.timeout,
            expected=self.expect,
            on_wait=lambda place: err.print(
                f"waiting for a free session, number {place} in the queue", style="dim"
            ),
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class SessionOptions(ClientOptions):
    """Options of a client that asks for answers, with a dealer or from a store."""

    store: StoreAt = None
    store_key: StoreKey = None
    keep: Keep = None
    tokenizer: Tokenizer = None
    device: DeviceOption = Device.cpu
    ranks: Ranks = 1
    public_prompt: PublicPrompt = None
    reuse: Reuse = True
    prompt_piece: PromptPiece = 0
    overlap: Overlap = True
    pad_prompt: PadPrompt = None

    def public(self) -> str | None:
        """The public text, if one is given."""
        if self.public_prompt is None:
            return None
        from mergec.runtime.session.public_text import read_public_text

        return read_public_text(self.public_prompt)

    def connection(
        self,
        public: str | Sequence[int] | None = None,
        chat: bool | None = None,
        ahead: AheadPlan | None = None,
        blocks: Sequence[str | Sequence[int]] = (),
    ) -> Connection:
        """A connection, not yet open; with a store it needs no dealer.

        public: a public text. blocks: public blocks behind it. chat, ahead: see `Connection`.
        """
        store = self._opened_store()
        return self._connection(
            public_prefixes=[] if public is None else [public],
            public_chat=chat,
            public_blocks=blocks,
            reuse=self.reuse,
            prompt_piece=self.prompt_piece,
            overlap=self.overlap,
            pad_prompt=self.pad_prompt or 0,
            ahead=ahead,
            on_notice=lambda told: err.print(told, style="dim", soft_wrap=True),
            dealer=address(self.dealer) if store is None else None,
            store=store,
            device=self.device.value,
            ranks=self.ranks,
            keep=self.keep,
            tokenizer=self.tokenizer,
        )

    def _opened_store(self) -> Store | None:
        """The given store; of a folder of several, the first one that is not used up."""
        if self.store is None:
            return None
        from mergec.runtime.session.stores.folder import stores_below
        from mergec.runtime.session.stores.format import StoreError, read_key
        from mergec.runtime.session.stores.reader import Store

        secret = read_key(self.store_key)
        found: list[Store] = []
        reasons: list[StoreError] = []
        for place in stores_below(self.store):
            try:
                found.append(Store.open(place, secret))
                if found[-1].left():
                    return found[-1]
            except StoreError as error:  # of another version, say, or restored from a backup
                reasons.append(error)
        if reasons:
            raise reasons[0]
        return found[0] if found else Store.open(self.store, secret)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen."""

    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = None
    seed: Seed = None

    def sampling(self) -> Sampling:
        from mergec.runtime.session.sampling import Sampling

        return Sampling(**asdict(self))


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """What drafts tokens that a step checks several of at once."""

    speculate: Annotated[
        str,
        typer.Option(
            help="What drafts the next tokens, so that a step can give several: `lookup`, "
            "`medusa`, `recycle`, `retrieve:DIR`, `draft:DIR`, several joined by `+`, or `none`."
        ),
    ] = "none"
    speculate_tokens: Annotated[
        int | None,
        typer.Option(help="Drafted tokens of a step; by default as many as pay.", min=1),
    ] = None
    speculate_fixed: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Keep N tokens of each step in the mean, as 2 or 1.5, so that its lengths do not "
            "tell how many drafts were right; then each step has all drafts.",
            min=1.0,
        ),
    ] = None
    speculate_extra: Annotated[
        int | None,
        typer.Option(
            metavar="E",
            help="With --speculate-fixed: take at most E extra steps where too few drafts were "
            "right, and then one token a step; by default any number.",
            min=0,
        ),
    ] = None
    speculate_tree: Annotated[
        bool,
        typer.Option(
            "--speculate-tree",
            help="Draft several continuations that a step checks at once; server and dealer see "
            "their shape, and which of them is right.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class AheadOptions:
    """What the dealer deals while a session waits for the next prompt."""

    prepare_ahead: Annotated[
        int,
        typer.Option(
            help="Most steps of one token to have dealt while nobody asks for an answer; 0: none.",
            min=0,
        ),
    ] = 0
    prepare_prompt: Annotated[
        int,
        typer.Option(
            help="Tokens of a prompt's first step, to be dealt before those; 0: a step for each "
            "token.",
            min=0,
        ),
    ] = 0
    prepare_disk: PrepareDisk = "2GB"

    def plan(self, drafting: SpeculationOptions, fixed_length: bool = False) -> AheadPlan | None:
        """What to have dealt; None for nothing. Raises MergecError if it does not go with these."""
        from mergec.runtime.session.ahead import AheadPlan
        from mergec.runtime.session.drafting.speculation import NONE

        if not self.prepare_ahead:
            if self.prepare_prompt:
                raise MergecError(
                    "--prepare-prompt needs --prepare-ahead, as in --prepare-ahead 24"
                )
            return None
        if drafting.speculate not in (NONE, ""):
            raise MergecError(
                "--prepare-ahead has steps of one token dealt, and with --speculate a step takes "
                "several; leave one of them out"
            )
        if fixed_length:
            raise MergecError(
                "with --fixed-length no prompt continues an answer, and --prepare-ahead has steps "
                "dealt for one that does; leave one of them out"
            )
        return AheadPlan(self.prepare_ahead, self.prepare_prompt, size_of(self.prepare_disk))


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_of(text: str) -> int:
    """A number of bytes, from `2GB`, `1.5 MB` or `4096`; MergecError if it is none."""
    number, unit = re.fullmatch(r"(.*?)\s*([KMGT]?B|)", text.strip().upper(), re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        found = float(number) * _UNITS.get(unit, 1)
        if 0 <= found < 1 << 62:
            return int(found)
    except ValueError:
        pass
    raise MergecError(f"{text!r} is no size; write 2GB, 500MB or a number of bytes")


def address(text: str) -> Address:
    """An address from `host:port`; MergecError if it has another form."""
    from mergec.runtime.transport.address import Address

    return Address.parse(text)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options: parameters that are annotated with a dataclass.

    To typer, each field of such a dataclass is a parameter of the command.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {n: kind for n, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            parameters.append(
                inspect.Parameter(
                    parameter.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=parameter.default,
                    annotation=hints[parameter.name],
                )
            )
            continue
        types = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=types[field.name],
                )
            )

    @functools.wraps(command)
    def take(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **given)

    take.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    take.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return take
