"""Prompts that begin with public text, continue earlier ones, or come in pieces; docs/prompts.md.

Rounds and bytes are those of the steps, by running them on shapes (`engine.rehearsal`): the
parties send nothing else. Then the same prompts run, with the three roles as processes of this
machine: seconds to the first token, the difference of logits, and peak memory.

Usage: python benchmarks/prompts.py [--bundles DIR] [--output FILE] [--counts]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from mergec import Program
from mergec.compiler.driver import compile_source
from mergec.compiler.report.tables import markdown
from mergec.compiler.report.text import readable
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.core.spec import Cost
from mergec.runtime.engine.packing import online_bytes
from mergec.runtime.engine.rehearsal import Rehearsal
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.conversations import common_length
from mergec.runtime.session.generation import Token
from tests.services import deployment

PUBLIC, SECRET = 200, 30
"""Tokens of the public text, and of the prompt after it."""

LONG, PIECES = 256, (0, 64)
"""Tokens of a prompt that is fed in pieces, and the most of them in a step; 0: all."""

TURNS = ("What is the capital of France?", "And how many people live there?")
REPLY = "The capital of France is Paris."
"""The first turn's answer where none is computed."""

ANSWER = 8
"""Most tokens of an answer."""

SHOWN = ("loopback", "lan", "wan")


@dataclass(frozen=True)
class Counted:
    """Rounds and bytes of some steps together. dealt: by the role that receives them."""

    cost: Cost
    dealt: dict[str, int]

    def cells(self) -> list[str]:
        seconds = [NETWORKS[name].waiting(self.cost, self.dealt).total for name in SHOWN]
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
    with torch.inference_mode():
        for new, past in steps:
            most = 0
            for part in rehearsal.parts(new, past):
                most = max(most, part.start + len(part.rounds))
                online += sum(online_bytes(m) for messages in part.rounds for m in messages)
                for role, size in part.dealt.items():
                    dealt[role] += size
            rounds += most
    return Counted(Cost(rounds, online, sum(dealt.values())), dealt)


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
    """Rows of a long prompt, in pieces and as a whole."""
    rows = []
    for most in PIECES:
        found = run_local(bundles, ids, max_tokens=1, prompt_piece=most)
        seconds = sum(record.seconds for record in found.records)
        memory = [readable(found.peak_memory[role]) for role in ("client", "server", "dealer")]
        rows.append([f"{most or len(ids)}", f"{len(found.records)}", f"{seconds:.1f}", *memory])
    head = ["tokens of a piece", "steps", "s to the first token"]
    return [[*head, "client", "server", "dealer"], *rows]


PAGE = """# Prompts

What public text, caches that stay, and pieces save ([how to use them](guides/conversations.md)):
{model}, compiled for `loopback`. Written by `make prompts`.

## Rounds and bytes

Counted by running the steps on shapes; the parties send exactly these messages. Seconds are what a
step waits for the network at least, by the [cost model](guides/cost.md), with the dealer at work at
the same time. They leave out all computation.

{counts}

Public text of {public} tokens enters a session once, with {entered} from server to client and
nothing from the dealer.
{measured}"""

MEASURED = """
## Measured

Client, server and dealer as processes of one machine with {cores} cores, which does other work too.

A prompt of {total} tokens, of which {public} are public or none:

{public_rows}

*At the opening*: bytes that the session's start takes more. *Logits apart*: the largest difference
of the first token's logits; the server's noise in each (2^-8 standard deviation) is part of it.

A chat of two turns, answers of up to {answer} tokens:

{chat_rows}

A prompt of {long} tokens in pieces, with the largest resident memory of each role:

{piece_rows}
"""


def count(program: Program) -> list[list[str]]:
    """Rows of what each kind of prompt takes."""
    rehearsal = Rehearsal(program.any_role)
    whole = PUBLIC + SECRET
    text = program.text()
    turns = [{"role": "user", "content": TURNS[0]}]
    kept = [*text.encode_chat(turns), *text.encode(REPLY)]
    turns += [{"role": "assistant", "content": REPLY}, {"role": "user", "content": TURNS[1]}]
    turn = text.encode_chat(turns)
    second, common = len(turn), common_length(turn, kept)
    shown: list[tuple[str, list[tuple[int, int]]]] = [
        (f"prompt of {whole} tokens, all secret", [(whole, 0)]),
        (f"{SECRET} secret tokens after {PUBLIC} public ones", [(SECRET, PUBLIC)]),
        (f"second turn of a chat, {second} tokens, as a whole", [(second, 0)]),
        ("the same, after the first turn's caches", [(second - common, common)]),
        *(
            (f"prompt of {LONG} tokens in pieces of {most or LONG}", pieces(LONG, most))
            for most in PIECES
        ),
    ]
    rows = [[name, *counted(rehearsal, steps).cells()] for name, steps in shown]
    return [["", *HEAD], *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundles", type=Path, help="compiled bundles; default: SmolLM2")
    parser.add_argument("--counts", action="store_true", help="run nothing: rounds and bytes only")
    parser.add_argument("--output", type=Path, help="write the page here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bundles = options.bundles
        if bundles is None:
            bundles = Path(place) / "bundles"
            compile_source("smollm2", {"max_length": 320}).save(bundles)
        program = Program.load(bundles, ("client",))
        more: dict[str, Any] = {}
        counts = markdown(count(program))
        if not options.counts:
            ids = text_tokens(program, LONG)
            more = {
                "public_rows": markdown(run_public(bundles, ids[: PUBLIC + SECRET])),
                "chat_rows": markdown(run_chat(program, bundles)),
                "piece_rows": markdown(run_pieces(bundles, ids)),
            }
    sizes = {"public": PUBLIC, "total": PUBLIC + SECRET, "answer": ANSWER, "long": LONG}
    measured = MEASURED.format(cores=psutil.cpu_count(), **sizes, **more) if more else ""
    text = PAGE.format(
        model=program.manifest.model,
        counts=counts,
        entered=readable(entered(program, PUBLIC)),
        measured=measured,
        public=PUBLIC,
    )
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
