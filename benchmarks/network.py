"""Steps on emulated networks: what they wait for, as predicted and as measured.

Each program is compiled for the network that it runs on. All three links are slowed down in the
transport (`runtime.transport.emulated`): messages and the dealer's blocks are delivered when the
profile's latency and bandwidth would have delivered them. The roles send the same data as on a real
network. Network namespaces with tc netem would be the alternative, for which the kernel needs the
netem module.

Three parts: a decode step on every network; steps that check drafts, and prompts after public text,
on `wan`. Local work is measured by the same program on links that are not slowed down. Writes
network.md, network.json and network.png to benchmarks/results. What is not measured again stays as
it was measured last.

Usage: python benchmarks/network.py [--models gpt2-base smollm2-135m] [--layers N]
       [--parts decode drafts prompts] [--networks NAME …] [--several MODEL …]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from bench import MODELS, RESULTS, Shape, add_models, captured_models, steps_of
from harness import Taken, run
from torch import nn

mpl.use("Agg")
import matplotlib.pyplot as plt

from mergec import CompileConfig, compile_decoder
from mergec.compiler.frontend.capture import Captured
from mergec.compiler.report.tables import markdown
from mergec.runtime.core.network import NETWORKS, Waiting
from mergec.runtime.engine.rehearsal import Rehearsal, latencies, step_cost

STORED = "network.json"

STEP = (1, 128)
"""New and past tokens of the decode step."""

DRAFTS = 7
"""Most drafts that a step checks, as in speculation.py."""

PUBLIC, SECRET = 200, 30
"""Tokens of a public text, and of the prompt after it. The step is the same as after tokens that
were secret: the public ones are in the caches either way."""

SHAPES: dict[str, tuple[Shape, ...]] = {
    "decode": (STEP,),
    "drafts": tuple((1 + drafts, STEP[1]) for drafts in range(DRAFTS + 1)),
    "prompts": ((SECRET, PUBLIC), (SECRET + PUBLIC, 0)),
}
"""New and past tokens of the steps of each part."""

FAR = "wan"
"""The network of all parts but the first."""

REPEATS = {"decode": 3, "drafts": 2, "prompts": 1}
"""Runs of each step, after one of the first that warms up; the median counts."""


@dataclass(frozen=True)
class Row:
    """A step on a network. Bytes; waiting as predicted, and seconds as measured.

    local, local_prepared: measured without emulation, while the dealer works and with its
    randomness at hand. measured, prepared: the same on the emulated network. otherwise: the ops for
    which another protocol was chosen than for loopback.
    """

    part: str
    model: str
    network: str
    new: int
    past: int
    rounds: int
    latencies: int
    online_bytes: int
    to_client_bytes: int
    to_server_bytes: int
    waiting: Waiting
    local: float
    local_prepared: float | None
    measured: float
    prepared: float | None
    otherwise: str

    @property
    def predicted(self) -> float:
        """Seconds of a step while the dealer works."""
        return self.local + self.waiting.total

    @property
    def group(self) -> tuple[str, str, str]:
        """What is measured together."""
        return self.part, self.model, self.network

    @staticmethod
    def of(stored: dict[str, Any]) -> Row:
        return Row(**(stored | {"waiting": Waiting(**stored["waiting"])}))


def measure(
    part: str, name: str, model: nn.Module, captured: Captured, tokens: Sequence[int], network: str
) -> Iterable[Row]:
    """Compile for a network, and run the steps of a part with and without its delays."""
    options: dict[str, Any] = {"speculate_up_to": DRAFTS} if part == "drafts" else {}
    config = CompileConfig(network=network, **options)
    program = compile_decoder(model, config=config, captured=captured)
    shapes, repeats = SHAPES[part], REPEATS[part]

    def taken(emulated: str) -> list[Taken]:
        ahead = repeats if part == "decode" else 0
        steps = steps_of(program, tokens, shapes, repeats, ahead)
        warming = replace(steps[0], repeats=1, ahead=0)
        return run(program.roles, [warming, *steps], "mergec", network=emulated)[1:]

    plain = taken("")
    slow = plain if network == "loopback" else taken(network)
    rehearsal = Rehearsal(program.any_role)
    otherwise = program.inspect(*STEP).facts.get("chosen_otherwise_than_for_loopback", "")
    for (new, past), usual, delayed in zip(shapes, plain, slow, strict=True):
        step = step_cost(rehearsal, new, past)
        cost = step.cost
        if (delayed.rounds, delayed.online) != (cost.rounds, cost.online):
            raise RuntimeError(f"{name}: {delayed.rounds} rounds instead of {cost.rounds}")
        yield Row(
            part, name, network, new, past, cost.rounds, latencies(step.rounds),
            cost.online, step.dealt["client"], step.dealt["server"],
            step.waiting(NETWORKS[network]),
            usual.seconds, usual.online_seconds, delayed.seconds, delayed.online_seconds,
            str(otherwise),
        )  # fmt: skip


HEAD = (
    "rounds", "latencies", "online MB", "dealt MB, client", "server", "latencies s", "online s",
    "dealt s", "local s", "predicted s", "measured s",
)  # fmt: skip

PREPARED = ("prepared, predicted s", "measured s")

PAGE = """# Networks

Exact, server-held weights, revealed logits. Each program is compiled for the network that it runs
on; all three links are slowed down in the transport. Written by `make bench-wan`.

*latencies*: how often the step waits for a message to cross the network. *latencies s*: what that
takes, with what the machines spend on messages. *online s*: how much longer it takes as messages
have bytes. *dealt s*: the slower of the dealer's two links. *local s*: the same program on links
that are not slowed down. *predicted s*: local work, and the longer of dealt bytes, and latencies
with online bytes. *prepared*: all of the dealer's randomness is at hand before the step.

All parties share the machine's cores, so seconds of local work are those of a machine that is busy.
Where a step has many tokens, some of that work is done while messages travel, and then the
prediction is too long.

## A decode step after {past} tokens

![where the seconds of a step go](network.png)

{decode}

Ops for which another protocol was chosen than for loopback:

{chosen}

## Steps that check drafts

After {past} tokens, on `{far}`, by a program that checks up to {drafts} drafts. *× one*: measured,
against the step of one token, which a step has to outdo by the tokens that it gives.

{checked}

## A prompt after public text

A prompt of {secret} secret tokens after {public} that both parties know, and all of them secret,
on `{far}`.

{prompts}
"""


def table(rows: Sequence[Row]) -> str:
    """The rows as a page."""
    by_part = {part: [row for row in rows if row.part == part] for part in SHAPES}
    decode = [["model", "network", *HEAD, *PREPARED]]
    decode += [[r.model, r.network, *_cells(r), *_prepared(r)] for r in by_part["decode"]]
    single = {row.model: row.measured for row in by_part["drafts"] if row.new == 1}
    checked = [["model", "drafts", *HEAD, "× one"]]
    checked += [
        [r.model, str(r.new - 1), *_cells(r), f"{r.measured / single[r.model]:.2f}"]
        for r in by_part["drafts"]
    ]
    prompts = [["model", "secret", "public", *HEAD]]
    prompts += [[r.model, str(r.new), str(r.past), *_cells(r)] for r in by_part["prompts"]]
    others = [row for row in by_part["decode"] if row.network != "loopback"]
    return PAGE.format(
        decode=markdown(decode),
        chosen="\n".join(f"* {row.model}, {row.network}: {row.otherwise}" for row in others),
        checked=markdown(checked),
        prompts=markdown(prompts),
        past=STEP[1],
        far=FAR,
        drafts=DRAFTS,
        secret=SECRET,
        public=PUBLIC,
    )


def _cells(row: Row) -> list[str]:
    sizes = row.online_bytes, row.to_client_bytes, row.to_server_bytes
    waiting = row.waiting
    dealt = max(waiting.to_client, waiting.to_server)
    seconds = (
        waiting.latencies, waiting.online, dealt, row.local, row.predicted, row.measured,
    )  # fmt: skip
    counts = f"{row.rounds:,}", f"{row.latencies:,}"
    return [*counts, *(f"{n / 1e6:,.2f}" for n in sizes), *(f"{s:.2f}" for s in seconds)]


def _prepared(row: Row) -> list[str]:
    if row.local_prepared is None or row.prepared is None:
        return ["", ""]
    return [f"{row.local_prepared + row.waiting.prepared:.2f}", f"{row.prepared:.2f}"]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Where the seconds of each decode step go, and its measured time."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 3.5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        group = [row for row in rows if row.model == model][::-1]
        left = [0.0] * len(group)
        for label, values in (
            ("local work", [row.local for row in group]),
            ("latencies", [row.waiting.latencies for row in group]),
            ("online bytes", [row.waiting.online for row in group]),
            ("dealt bytes beyond", [row.waiting.total - row.waiting.prepared for row in group]),
        ):
            axis.barh([row.network for row in group], values, left=left, label=label)
            left = [a + b for a, b in zip(left, values, strict=True)]
        names = [row.network for row in group]
        axis.plot([row.measured for row in group], names, "k|", ms=14, label="measured")
        axis.set_xlabel("seconds")
        axis.set_title(f"{model}, decode after {STEP[1]}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def stored(path: Path) -> list[Row]:
    """The rows of an earlier run, if there are any of this form."""
    rows = json.loads(path.read_text()) if path.exists() else []
    names = {field.name for field in fields(Row)}
    return [Row.of(row) for row in rows if row.keys() == names]


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows, in the order of the page; new ones take the place of those of their group."""
    fresh = {row.group for row in new}
    order = list(SHAPES), list(MODELS), list(NETWORKS)

    def place(row: Row) -> list[int]:
        return [names.index(name) for names, name in zip(order, row.group, strict=True)]

    return sorted([row for row in old if row.group not in fresh] + list(new), key=place)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write the rows as JSON, page and picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STORED).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (folder / "network.md").write_text(table(rows))
    decode = [row for row in rows if row.part == "decode"]
    if decode:
        plot(decode, folder / "network.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_models(parser)
    parser.add_argument("--parts", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="of decode steps"
    )
    parser.add_argument(
        "--several", nargs="+", choices=MODELS, default=["smollm2-135m"],
        help="of the models, those that run steps of several tokens",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = stored(options.output / STORED)
    for name, model, tokens, captured in captured_models(options):
        for part in options.parts:
            several = [FAR] if name in options.several else []
            for network in options.networks if part == "decode" else several:
                found = list(measure(part, name, model, captured, tokens, network))
                print(*found, sep="\n", flush=True)
                rows = merged(rows, found)
                write(rows, options.output)


if __name__ == "__main__":
    main()
