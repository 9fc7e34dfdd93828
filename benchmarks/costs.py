"""What prompts and a decode step cost on each network, predicted by `Program.inspect`.

Compiles GPT-2-base and SmolLM2 for each network. Writes docs/costs.md, and a short table between
the marks in README.md. Nothing is measured here: network.py compares predictions with measurements,
and seconds of whole steps are those that bench.py last measured on loopback.

Usage: python benchmarks/costs.py [--models gpt2-base smollm2-135m] [--layers N] [--output FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import LATEST, RESULTS, ROOT, add_models, captured_models
from report import replace_between

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.report.tables import markdown

STEPS = ((16, 0), (64, 0), (150, 0), (500, 0), (1, 128))
"""New and past tokens."""

CHOSEN = ("loopback", "lan", "wan")
"""Networks that each model is compiled for."""


@dataclass(frozen=True)
class Row:
    """A step of a model that is compiled for a network. Bytes; seconds of the network alone."""

    model: str
    network: str
    new: int
    past: int
    rounds: int
    latencies: int
    online: int
    to_client: int
    to_server: int
    seconds: float
    prepared: float

    @property
    def measured(self) -> str:
        """Seconds of the whole step on loopback when bench.py last ran it, if it did."""
        stored = json.loads((RESULTS / LATEST).read_text())
        key = (self.model, self.new, self.past, "exact", "server", self.network)
        names = ("model", "new_tokens", "past", "preset", "weights", "network")
        found = [r["seconds"] for r in stored if tuple(r[n] for n in names) == key]
        return f"{found[0]:.2f}" if found and found[0] else ""

    @property
    def step(self) -> str:
        return f"decode after {self.past}" if self.past else f"prompt of {self.new}"


def predict(name: str, network: str, program: Program) -> Iterable[Row]:
    """The rows of a program."""
    for new, past in STEPS:
        found = program.inspect(new, past)
        waiting = found.facts["waiting_for"]
        yield Row(
            name, network, new, past, found.total.rounds, found.facts["one_way_latencies"],
            found.total.online, found.facts["dealt_to_client"], found.facts["dealt_to_server"],
            found.facts["estimated_network_seconds"], waiting["latencies"] + waiting["online"],
        )  # fmt: skip


PAGE = """# Costs before they are paid

Rounds and bytes of a prompt, and of a decode step after 128 tokens: exact, server-held weights,
revealed logits, each program compiled for its network. Nothing here is measured. The figures are
predictions of the cost model, as `mergec inspect` prints them; tests hold its rounds and bytes to
the transport's counters. Written by `make costs`.

*latencies*: how often the step waits for a message to cross the network, which is less often than
it has rounds where a party sends alone and goes on ([Latencies](performance.md#latencies)).
*online*: between client and server, both directions together. *dealt*: from the dealer, on each of
its two links. *seconds*: what the step waits for the network, while the dealer's bytes arrive.
*prepared*: the same with the dealer's randomness at hand ([Cost and latency](guides/cost.md)).
The parties' own work comes on top. On loopback it takes nearly all of the time: *measured* is
what the last [benchmark](benchmark.md) measured there, dealer included, where it ran that step.
`make bench-wan` runs decode steps on emulated networks and compares the predictions with what it
measures. Bounds are calibrated on token numbers here. A model that is compiled with its tokenizer
is calibrated on text, so some bounds are others, and bytes may differ by a few per cent.

| network | between client and server | dealer to client | dealer to server |
| --- | --- | --- | --- |
| loopback | one machine | one machine | one machine |
| lan | 0.25 ms, 1 Gbit/s | 0.25 ms, 1 Gbit/s | 0.25 ms, 1 Gbit/s |
| wan | 20 ms, 100 Mbit/s | 20 ms, 100 Mbit/s | 0.5 ms, 10 Gbit/s |

{tables}
"""

HEAD = [
    "step", "network", "rounds", "latencies", "online MB", "dealt MB, client", "dealt MB, server",
    "seconds", "prepared", "measured",
]  # fmt: skip

SHORT = [
    "step", "rounds", "online MB", "dealt MB, client", "dealt MB, server",
    "seconds of the network", "seconds on loopback, measured",
]  # fmt: skip


def page(rows: Sequence[Row]) -> str:
    """The page: a table for each model."""
    tables = []
    for model in dict.fromkeys(row.model for row in rows):
        cells = [list(HEAD)]
        cells += [
            [
                row.step, row.network, f"{row.rounds:,}", f"{row.latencies:,}",
                megabytes(row.online), megabytes(row.to_client), megabytes(row.to_server),
                f"{row.seconds:,.2f}", f"{row.prepared:,.2f}", row.measured,
            ]
            for row in sorted((r for r in rows if r.model == model), key=order)
        ]  # fmt: skip
        tables.append(f"## {model}\n\n{markdown(cells)}")
    return PAGE.format(tables="\n\n".join(tables))


def short(rows: Sequence[Row]) -> str:
    """A line for each step of each model, networks beside each other."""
    cells = [["model", *SHORT]]
    for model in dict.fromkeys(row.model for row in rows):
        for step in STEPS:
            group = sorted(
                (r for r in rows if (r.model, r.new, r.past) == (model, *step)), key=order
            )
            bytes_of = [
                joined([getattr(row, key) for row in group], megabytes)
                for key in ("online", "to_client", "to_server")
            ]
            cells.append([
                model, group[0].step, joined([row.rounds for row in group], "{:,}".format),
                *bytes_of, joined([row.seconds for row in group], "{:,.1f}".format),
                group[0].measured,
            ])  # fmt: skip
    return markdown(cells)


def order(row: Row) -> tuple[int, int]:
    return STEPS.index((row.new, row.past)), CHOSEN.index(row.network)


def joined(values: Sequence[float], text: Callable[[Any], str]) -> str:
    """The networks' figures; the first alone if they are within a hundredth of each other."""
    if max(values) - min(values) <= 0.01 * max(values):
        return text(values[0])
    return " / ".join(map(text, values))


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count < 1e8 else f"{count / 1e6:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_models(parser)
    parser.add_argument("--output", type=Path, help="page to write; README stays as it is")
    options = parser.parse_args()
    rows: list[Row] = []
    for name, model, _, captured in captured_models(options):
        for network in CHOSEN:
            config = CompileConfig(network=network)
            program = compile_decoder(model, config=config, captured=captured)
            rows += predict(name, network, program)
            print(*rows[-len(STEPS) :], sep="\n", flush=True)
            del program
            gc.collect()
    (options.output or ROOT / "docs" / "costs.md").write_text(page(rows))
    if options.output is None:
        replace_between(ROOT / "README.md", "costs", short(rows))


if __name__ == "__main__":
    main()
