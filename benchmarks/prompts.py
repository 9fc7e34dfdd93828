"""Prompts that begin with public text, continue earlier ones, or come in pieces; docs/prompts.md.

Rounds and bytes are those of the steps, by running them on shapes (`engine.rehearsal`): the
parties send nothing else. Then the same prompts run, with the three roles as processes of this
machine: seconds to the first token, the difference of logits, and peak memory.

Usage: python benchmarks/prompts.py [--bundles DIR] [--wan DIR] [--output FILE]
       [--measure PART …]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path

import psutil
import torch
from report import between, marked

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.driver import compile_source
from mergec.compiler.report.tables import markdown
from mergec.compiler.report.text import readable
from mergec.runtime.core.network import NETWORKS, Link, Waiting
from mergec.runtime.core.spec import Cost
from mergec.runtime.engine.rehearsal import (
    Rehearsal,
    by_turn,
    exchanged,
    latencies,
    overlapped_seconds,
    step_cost,
)
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.ahead import AheadPlan
from mergec.runtime.session.conversations import common_length
from mergec.runtime.session.generation import Token
from tests.services import deployment

PUBLIC, SECRET = 200, 30
"""Tokens of the public text, and of the prompt after it."""

BLOCKS, KNOWN = 4, 8
"""Blocks that the public text is made of, and that a session knows."""

LONG, PIECES = 256, (0, 64)
"""Tokens of a prompt that is fed in pieces, and the most of them in a step; 0: all."""

LONGER = (512, 1000)
"""Tokens of prompts that run in pieces alone, of the last size."""

TURNS = ("What is the capital of France?", "And how many people live there?")
REPLY = "The capital of France is Paris."
"""The first turn's answer where none is computed."""

ANSWER = 8
"""Most tokens of an answer."""

SHOWN = ("loopback", "lan", "wan")

HALVED = (64, LONG)
"""Tokens of prompts whose halves overlap."""

FIRST = 16
"""Tokens of the first step that is dealt ahead."""

TURN = 20
"""Tokens of a turn for which steps are dealt ahead."""

LAYERS = 3
"""Layers of a model that runs where SmolLM2 would take too long."""

PARTS = ("public", "chat", "pieces", "ahead", "overlap")
"""What can be measured."""


@dataclass(frozen=True)
class Counted:
    """Rounds and bytes of some steps together. dealt: by the role that receives them.

    waiting: what each step waits for, by network.
    """

    cost: Cost
    dealt: dict[str, int]
    waiting: dict[str, list[Waiting]]

    def seconds(self, name: str, dealer: bool = True) -> float:
        """What the steps wait for a network. dealer: whether they wait for the dealer's bytes."""
        return sum(step.total if dealer else step.prepared for step in self.waiting[name])

    def cells(self) -> list[str]:
        seconds = [self.seconds(name) for name in SHOWN]
        return [
            f"{self.cost.rounds:,}",
            readable(self.cost.online),
            readable(self.dealt["client"]),
            readable(self.dealt["server"]),
            *(f"{value:.1f}" for value in seconds),
        ]


HEAD = ["rounds", "online", "dealt to client", "dealt to server", *(f"{n}, s" for n in SHOWN)]


def counted(rehearsal: Rehearsal, steps: Sequence[tuple[int, int]]) -> Counted:
    """What steps of these new and past tokens take."""
    rounds = online = 0
    dealt = {"client": 0, "server": 0}
    waiting: dict[str, list[Waiting]] = {name: [] for name in SHOWN}
    for new, past in steps:
        step = step_cost(rehearsal, new, past)
        rounds, online = rounds + step.cost.rounds, online + step.cost.online
        dealt = {role: size + step.dealt[role] for role, size in dealt.items()}
        for name, of in waiting.items():
            of.append(step.waiting(NETWORKS[name]))
    return Counted(Cost(rounds, online, sum(dealt.values())), dealt, waiting)


def halves(program: Program) -> list[list[str]]:
    """Rows of long prompts as a whole, in pieces, and as two halves that overlap."""
    network, rows = NETWORKS["wan"], []
    rehearsal = Rehearsal(program.any_role)

    def row(name: str, waits: int, messages: int, online: int, seconds: float) -> None:
        rows.append([name, f"{waits:,}", f"{messages:,}", readable(online), f"{seconds:.1f}"])

    for length in HALVED:
        for most in (length, *(n for n in PIECES if 0 < n < length)):
            name = f"{length} tokens" if most == length else f"{length} tokens in pieces of {most}"
            steps = pieces(length, most)
            found = counted(rehearsal, steps)
            row(
                name,
                sum(latencies(rehearsal.step(new, past)) for new, past in steps),
                found.cost.rounds,
                found.cost.online,
                found.seconds("wan", dealer=False),
            )
            messages = [rehearsal.pieces(new // 2, new, past) for new, past in steps]
            row(
                f"{name}, halves that overlap",
                sum(round(exchanged(by_turn(step), Link(1.0, inf))) for step in messages),
                sum(map(len, messages)),
                sum(message.online for step in messages for message in step),
                sum(
                    overlapped_seconds(rehearsal, new // 2, new, past, network)
                    for new, past in steps
                ),
            )
    return [["", "waits for the latency", "messages each way", "online", "wan, s"], *rows]


def waited(program: Program) -> list[list[str]]:
    """Rows of a chat's second turn and its answer, with and without steps that are dealt ahead."""
    rehearsal = Rehearsal(program.any_role)
    second, common = second_turn(program)
    answer = [(1, second + n) for n in range(ANSWER - 1)]
    live = [(second - common, common), *answer]
    ahead = [(FIRST, common), *((1, n) for n in range(common + FIRST, second)), *answer]
    rows = []
    for name, steps, dealt in (
        ("with the dealer", live, True), ("dealt ahead", ahead, False)
    ):  # fmt: skip
        found = counted(rehearsal, steps)
        seconds = [found.seconds(network, dealer=dealt) for network in SHOWN]
        sizes = [readable(found.dealt[role]) if dealt else "0" for role in ("client", "server")]
        rows.append(
            [name, f"{len(steps)}", f"{found.cost.rounds:,}", readable(found.cost.online), *sizes,
             *(f"{value:.1f}" for value in seconds)]
        )  # fmt: skip
    head = ["", "steps", *HEAD[:2], *(f"{name} while it is waited for" for name in HEAD[2:4])]
    return [[*head, *HEAD[4:]], *rows]


def second_turn(program: Program) -> tuple[int, int]:
    """Tokens of a chat's second prompt, and how many of them the first turn's caches have."""
    text = program.text()
    turns = [{"role": "user", "content": TURNS[0]}]
    kept = [*text.encode_chat(turns), *text.encode(REPLY)]
    turns += [{"role": "assistant", "content": REPLY}, {"role": "user", "content": TURNS[1]}]
    turn = text.encode_chat(turns)
    return len(turn), common_length(turn, kept)


def entered(program: Program, length: int) -> int:
    """Bytes that a public text of so many tokens takes, once in a session."""
    caches = [spec.shape for spec in program.any_role.inputs if spec.cache_output is not None]
    return 8 * length * sum(prod(n for n in shape if isinstance(n, int)) for shape in caches)


def pieces(length: int, most: int) -> list[tuple[int, int]]:
    """New and past tokens of the steps that feed a prompt."""
    most = most or length
    return [(min(most, length - past), past) for past in range(0, length, most)]


@dataclass(frozen=True)
class Asked:
    """An answer as it ran. seconds: to its first token."""

    tokens: list[Token]
    seconds: float

    @property
    def online(self) -> int:
        """Bytes of the prompt's steps, in both directions."""
        reports = self.tokens[0].reports
        return sum(report.sent + report.received for report in reports)

    @property
    def new(self) -> int:
        return sum(report.new for report in self.tokens[0].reports)


def ask(connection: Connection, prompt: Sequence[int], count: int = 1) -> Asked:
    connection.open()
    began, first, tokens = time.perf_counter(), 0.0, []
    for token in connection.generate(prompt, max_tokens=count):
        first = first or time.perf_counter() - began
        tokens.append(token)
    return Asked(tokens, first)


def text_tokens(program: Program, count: int) -> list[int]:
    """So many tokens of English: the beginning of this project's licence and guides."""
    root = Path(__file__).resolve().parent.parent
    said = "\n".join((root / name).read_text() for name in ("LICENSE", "docs/threat-model.md"))
    return program.text().encode(said)[:count]


def run_public(bundles: Path, ids: list[int]) -> list[list[str]]:
    """Rows of a prompt with and without public text: as counted and measured where it runs."""
    public = ids[:PUBLIC]
    rows, found = [], []
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "public.json"
        file.write_text(json.dumps(public))
        with deployment(bundles, serve=("--public-prompt", str(file), "--timeout", "600")) as made:
            for texts in ([], [public]):
                with made.connection(public_prefixes=texts, timeout=600.0) as connection:
                    asked = ask(connection, ids)
                    opened = connection.setup.received
                found.append((asked, opened))
    usual, known = (asked for asked, _ in found)
    apart = float((usual.tokens[0].logits - known.tokens[0].logits).abs().max())
    for name, (asked, opened) in zip(("all secret", f"{PUBLIC} public"), found, strict=True):
        extra = opened - found[0][1]
        rows.append(
            [name, f"{asked.new}", f"{asked.seconds:.1f}", readable(asked.online), readable(extra)]
        )
    rows[1].append(f"{apart:.4f}")
    rows[0].append("")
    return [
        ["", "tokens computed", "s to the first token", "online", "at the opening", "logits apart"],
        *rows,
    ]


def run_chat(program: Program, bundles: Path) -> list[list[str]]:
    """Rows of a chat of two turns, with and without the first turn's caches."""
    text, rows = program.text(), []
    with deployment(bundles, serve=("--timeout", "600")) as made:
        for reuse in (False, True):
            turns: list[dict[str, str]] = []
            with made.connection(reuse=reuse, timeout=600.0) as connection:
                for number, said in enumerate(TURNS, 1):
                    turns.append({"role": "user", "content": said})
                    prompt = text.encode_chat(turns)
                    asked = ask(connection, prompt, ANSWER)
                    answer = text.decode([token.token for token in asked.tokens])
                    turns.append({"role": "assistant", "content": answer})
                    name = f"turn {number}, {'caches kept' if reuse else 'as a whole'}"
                    rows.append(
                        [name, f"{len(prompt)}", f"{asked.new}", f"{asked.seconds:.1f}",
                         readable(asked.online)]
                    )  # fmt: skip
    return [["", "prompt", "tokens computed", "s to the first token", "online"], *rows]


def run_pieces(bundles: Path, ids: list[int]) -> list[list[str]]:
    """Rows of long prompts, in pieces and as a whole."""
    rows = []
    for length, most in [*((LONG, most) for most in PIECES), *((n, PIECES[-1]) for n in LONGER)]:
        found = run_local(bundles, ids[:length], max_tokens=1, prompt_piece=most)
        seconds = sum(record.seconds for record in found.records)
        memory = [readable(found.peak_memory[role]) for role in ("client", "server", "dealer")]
        rows.append(
            [f"{length}", f"{most or length}", f"{len(found.records)}", f"{seconds:.1f}", *memory]
        )
    head = ["tokens of the prompt", "of a piece", "steps", "s to the first token"]
    return [[*head, "client", "server", "dealer"], *rows]


def run_ahead(bundles: Path, ids: Sequence[int]) -> list[list[str]]:
    """Rows of some turns, with and without steps that are dealt ahead, in alternation.

    ids: tokens that the turns take their own from.
    """
    plan = AheadPlan(TURN - FIRST + ANSWER, FIRST, 1 << 33)
    serve = ("--timeout", "600", "--prepare-disk", "8GB")
    rows = []
    with (
        deployment(bundles, serve=serve) as made,
        made.connection(timeout=600.0) as live,
        made.connection(timeout=600.0, ahead=plan) as prepared,
    ):
        texts: dict[Connection, list[int]] = {live: [], prepared: []}
        for turn in range(RUNS + 1):
            row = [f"turn {turn + 1}"]
            for connection, text in texts.items():
                text += ids[turn * TURN : (turn + 1) * TURN]
                while connection is prepared and connection.prepared < 1 + plan.tokens:
                    time.sleep(0.1)
                began = time.perf_counter()
                asked = ask(connection, text, ANSWER)
                whole = time.perf_counter() - began
                text += [token.token for token in asked.tokens]
                row += [f"{asked.seconds:.1f}", f"{whole:.1f}"]
            if turn:  # the first one compiles kernels
                rows.append(row)
    first, last = "s to the first token", "s to the last"
    return [["", first, last, f"dealt ahead: {first}", last], *rows]


def small_llama(layers: int, network: str) -> Program:
    """A Llama of SmolLM2's width with few layers, and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shapes = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=1024, max_position_embeddings=256,
    )  # fmt: skip
    config = CompileConfig(max_length=192, network=network)
    return compile_decoder(LlamaForCausalLM(shapes).eval(), config=config)


def run_small_ahead() -> list[list[str]]:
    """`run_ahead` of a small model."""
    with tempfile.TemporaryDirectory() as place:
        small_llama(LAYERS, "loopback").save(Path(place) / "bundles")
        return run_ahead(Path(place) / "bundles", [7 + 13 * n % 1000 for n in range(LONG)])


def run_overlap(wan: Path) -> list[list[str]]:
    """Rows of prompts on an emulated network, as a whole and as two halves that overlap.

    wan: bundles of the page's model, compiled for `wan`; it takes its turn after a small one.
    """
    rows = [["tokens", "", "predicted wait, s", "work without a network, s", "measured, s"]]
    rows += overlapped(small_llama(LAYERS, "wan").roles, HALVED[0], RUNS)
    return rows + overlapped(Program.load(wan).roles, HALVED[1], 1)


def overlapped(roles: Mapping[str, RoleProgram], length: int, runs: int) -> list[list[str]]:
    """Rows of a prompt of so many tokens, each run so often, in alternation."""
    ids = [7 + 13 * n % 1000 for n in range(length)]
    network, rehearsal = NETWORKS["wan"], Rehearsal(roles["client"])
    half = len(ids) // 2
    waits = {
        0: step_cost(rehearsal, len(ids), 0).waiting(network).prepared,
        half: overlapped_seconds(rehearsal, half, len(ids), 0, network),
    }
    seconds: dict[int, list[float]] = {split: [] for split in waits}
    local: list[float] = []
    warm = ids[:2]  # compiles kernels
    with InProcessSession(roles) as session:
        session.step(warm, 0)
        for _ in range(runs):
            began = time.perf_counter()
            session.step(ids, 0)
            local.append(time.perf_counter() - began)
    with InProcessSession(roles, emulated=network.parties) as session:
        session.step(warm, 0, split=1)
        for _ in range(runs):
            for split, found in seconds.items():
                began = time.perf_counter()
                session.step(ids, 0, split=split)
                found.append(time.perf_counter() - began)
    return [
        [str(length), name, f"{waits[split]:.2f}", f"{min(local):.2f}",
         ", ".join(f"{value:.2f}" for value in seconds[split])]
        for name, split in (("whole", 0), ("halves", half))
    ]  # fmt: skip


RUNS = 3
"""Runs of each kind of a small model on the emulated network, in alternation."""

PAGE = """# Prompts

What public text, caches that stay, and pieces save ([how to use them](guides/conversations.md)):
{model}, compiled for `loopback`. Written by `make prompts`.

## Rounds and bytes

Counted by running the steps on shapes; the parties send exactly these messages. Seconds are what a
step waits for the network at least, by the [cost model](guides/cost.md), with the dealer at work at
the same time. They leave out all computation.

{counts}

Public text of {public} tokens enters a session once, with {entered} from server to client and
nothing from the dealer. So does each [block](guides/conversations.md#public-blocks): {known} of
{block} tokens, with {all_blocks} together. Prompts that combine {blocks} of them in other ways take
nothing more, where each combination would enter as a public text of its own, with {entered}.

## Halves that overlap

The same model compiled for `wan`. The halves of a step follow each other through the layers: while
a message of one is on its way, the parties compute the other. The second half needs the first one's
keys and values of the same layer alone, so it is a part of a layer behind, and both together wait
for the latency as often as one. *wan, s*: what the step waits for messages, by the cost model. All
computation is left out, and of the halves most of it is done while messages travel.

{halves}

With halves of 256 tokens each direction of the line is busy for more than four fifths of that time,
so more pieces at once could save little. Pieces one after the other wait for the latency once for
each, and save memory, and the scores of later tokens. So a step is cut in two, and where
`--prompt-piece` bounds the memory, each piece is.

## Dealing ahead

The second turn of the chat, as it continues the first one's caches, and an answer of {answer}
tokens. With the dealer: the prompt in one step. Dealt ahead, with `--prepare-prompt {first}`: its
first {first} tokens in one step, and then a step for each token.

{waited}

On `wan` latencies are what is waited for, not the dealer. There a client feeds such a prompt as a
whole, and what was dealt is thrown away. On `loopback` it is computation, which this table leaves
out: a token that takes a step of its own takes longer than one of a prompt
([measured](costs.md) with the dealer), so there only the answer gains. It pays where the dealer's
link is slow for what it carries, as on `lan`. A client notes what steps take, and feeds a prompt
accordingly.
{measured}"""

MEASURED = """
## Measured

Client, server and dealer as processes of one machine with {cores} cores, which does other work too.
"""

SECTIONS = {
    "public": """
A prompt of {total} tokens, of which {public} are public or none:

{rows}

*At the opening*: bytes that the session's start takes more. *Logits apart*: the largest difference
of the first token's logits; the server's noise in each (2^-8 standard deviation) is part of it.
""",
    "chat": """
A chat of two turns, answers of up to {answer} tokens:

{rows}
""",
    "pieces": """
Prompts in pieces, with the largest resident memory of each role:

{rows}
""",
    "ahead": """
Turns of {turn} tokens, each with an answer of {answer} tokens, of a Llama of SmolLM2's width and
{layers} layers: two sessions in alternation. One has its steps dealt before each turn, a step of
{first} tokens and the others of one:

{rows}
""",
    "overlap": """
Prompts on the emulated link of `wan`, for which the programs are compiled: {halved} tokens of a
Llama of SmolLM2's width and {layers} layers, and {long} of the page's model. All roles are in one
process, and the runs in alternation. They share these cores, so less of the work hides behind
messages than on three machines:

{rows}
""",
}


def count(program: Program) -> list[list[str]]:
    """Rows of what each kind of prompt takes."""
    rehearsal = Rehearsal(program.any_role)
    whole = PUBLIC + SECRET
    second, common = second_turn(program)
    shown: list[tuple[str, list[tuple[int, int]]]] = [
        (f"prompt of {whole} tokens, all secret", [(whole, 0)]),
        (f"{SECRET} secret tokens after {PUBLIC} public ones", [(SECRET, PUBLIC)]),
        (f"the same after any {BLOCKS} blocks of {PUBLIC // BLOCKS}", [(SECRET, PUBLIC)]),
        (f"second turn of a chat, {second} tokens, as a whole", [(second, 0)]),
        ("the same, after the first turn's caches", [(second - common, common)]),
        *(
            (f"prompt of {LONG} tokens in pieces of {most or LONG}", pieces(LONG, most))
            for most in PIECES
        ),
    ]
    rows = [[name, *counted(rehearsal, steps).cells()] for name, steps in shown]
    return [["", *HEAD], *rows]


def measured(
    parts: Sequence[str], program: Program, bundles: Path, wan: Path, page: Path | None
) -> str:
    """The sections of what runs; those of other parts stay as they are on the page.

    bundles, wan: of the program, and the same compiled for `wan`.
    """
    ids = text_tokens(program, max(LONG, *LONGER))
    runs: dict[str, Callable[[], list[list[str]]]] = {
        "public": lambda: run_public(bundles, ids[: PUBLIC + SECRET]),
        "chat": lambda: run_chat(program, bundles),
        "pieces": lambda: run_pieces(bundles, ids),
        "ahead": run_small_ahead,
        "overlap": lambda: run_overlap(wan),
    }
    sizes = {
        "public": PUBLIC, "total": PUBLIC + SECRET, "answer": ANSWER,
        "halved": HALVED[0], "long": HALVED[1], "layers": LAYERS, "turn": TURN, "first": FIRST,
    }  # fmt: skip

    def section(part: str) -> str:
        if part not in parts:
            return between(page, part) if page and page.exists() else ""
        return marked(part, SECTIONS[part].format(rows=markdown(runs[part]()), **sizes))

    told = "\n".join(filter(None, map(section, PARTS)))
    return f"{MEASURED.format(cores=psutil.cpu_count())}\n{told}" if told else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundles", type=Path, help="compiled bundles; default: SmolLM2")
    parser.add_argument("--wan", type=Path, help="the same, compiled for wan")
    parser.add_argument(
        "--measure",
        nargs="*",
        choices=PARTS,
        default=PARTS,
        help="what to run; default: all. Sections of the rest stay as they are",
    )
    parser.add_argument("--output", type=Path, help="write the page here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = {"loopback": options.bundles, "wan": options.wan}
        for network, given in found.items():
            if given is None:
                found[network] = Path(place) / network
                config = {"max_length": 1024, "network": network}
                compile_source("smollm2", config).save(found[network])
        program = Program.load(found["loopback"], ("client",))
        text = PAGE.format(
            model=program.manifest.model,
            counts=markdown(count(program)),
            entered=readable(entered(program, PUBLIC)),
            known=KNOWN,
            blocks=BLOCKS,
            block=PUBLIC // BLOCKS,
            all_blocks=readable(entered(program, KNOWN * PUBLIC // BLOCKS)),
            halves=markdown(halves(Program.load(found["wan"], ("client",)))),
            waited=markdown(waited(program)),
            measured=measured(
                options.measure, program, found["loopback"], found["wan"], options.output
            ),
            public=PUBLIC,
            answer=ANSWER,
            first=FIRST,
        )
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
