"""A decode step on emulated networks: what it waits for, as predicted and as measured.

Each program is compiled for the network that it runs on. All three links are slowed down in the
transport (`runtime.transport.emulated`): messages and the dealer's blocks are delivered when the
profile's latency and bandwidth would have delivered them. The roles send the same data as on a real
network. Network namespaces with tc netem would be the alternative, for which the kernel needs the
netem module.

Local work is measured by the same program on links that are not slowed down. Writes network.md,
network.json and network.png to benchmarks/results.

Usage: python benchmarks/network.py [--models gpt2-base smollm2-135m] [--layers N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
from bench import RESULTS, add_models, captured_models, steps_of
from harness import Taken, run
from torch import nn

mpl.use("Agg")
import matplotlib.pyplot as plt

from mergec import CompileConfig, compile_decoder
from mergec.compiler.backend.cost import dealt_bytes
from mergec.compiler.frontend.capture import Captured
from mergec.compiler.report.tables import markdown
from mergec.runtime.core.network import NETWORKS, Waiting
from mergec.runtime.core.spec import Cost

STEP = (1, 128)
"""New and past tokens."""

REPEATS = 3


@dataclass(frozen=True)
class Row:
    """A step on a network. Bytes; waiting as predicted, and seconds as measured.

    local, local_prepared: measured without emulation, while the dealer works and with its
    randomness at hand. measured, prepared: the same on the emulated network. otherwise: the ops for
    which another protocol was chosen than for loopback.
    """

    model: str
    network: str
    rounds: int
    online_bytes: int
    to_client_bytes: int
    to_server_bytes: int
    waiting: Waiting
    local: float
    local_prepared: float
    measured: float
    prepared: float
    otherwise: str

    @property
    def predicted(self) -> float:
        """Seconds of a step while the dealer works."""
        return self.local + self.waiting.total

    @property
    def predicted_prepared(self) -> float:
        """Seconds of a step with the dealer's randomness at hand."""
        return self.local_prepared + self.waiting.prepared


def measure(
    name: str, model: nn.Module, captured: Captured, tokens: Sequence[int], network: str
) -> Row:
    """Compile for a network, and run a step with and without its delays."""
    program = compile_decoder(model, config=CompileConfig(network=network), captured=captured)

    def taken(emulated: str) -> Taken:
        steps = steps_of(program, tokens, [STEP], repeats=REPEATS, ahead=REPEATS)
        return run(program.roles, steps, "mergec", network=emulated)[0]

    plain = taken("")
    slow = plain if network == "loopback" else taken(network)
    dealt = dealt_bytes(program.any_role, *STEP)
    waiting = NETWORKS[network].waiting(Cost(slow.rounds, slow.online, slow.offline), dealt)
    if plain.online_seconds is None or slow.online_seconds is None:
        raise RuntimeError("no step was run with its randomness at hand")
    return Row(
        name, network, slow.rounds, slow.online, dealt["client"], dealt["server"],
        waiting, plain.seconds, plain.online_seconds, slow.seconds, slow.online_seconds,
        str(program.inspect(*STEP).facts.get("chosen_otherwise_than_for_loopback", "")),
    )  # fmt: skip


HEAD = (
    "model", "network", "rounds", "online MB", "dealt MB, client", "server", "rounds s", "online s",
    "dealt s", "local s", "predicted s", "measured s", "prepared, predicted s", "measured s",
)  # fmt: skip

PAGE = """# Networks

A decode step after 128 tokens, exact, server-held weights, revealed logits. Each program is
compiled for the network that it runs on; all three links are slowed down in the transport.
Written by `make bench-wan`.

*dealt s*: the slower of the dealer's two links. *local s*: the same program on links that are not
slowed down. *predicted s*: local work, and the longer of rounds with online bytes and dealt bytes.
*prepared*: all of the dealer's randomness is at hand before the step.

{table}

Ops for which another protocol was chosen than for loopback:

{chosen}
"""


def table(rows: Sequence[Row]) -> str:
    """The rows as a page."""
    cells = [list(HEAD)]
    for row in rows:
        sizes = row.online_bytes, row.to_client_bytes, row.to_server_bytes
        waiting = row.waiting
        dealt = max(waiting.to_client, waiting.to_server)
        seconds = (
            waiting.rounds, waiting.online, dealt, row.local, row.predicted, row.measured,
            row.predicted_prepared, row.prepared,
        )  # fmt: skip
        figures = [*(f"{n / 1e6:.2f}" for n in sizes), *(f"{s:.2f}" for s in seconds)]
        cells.append([row.model, row.network, f"{row.rounds:,}", *figures])
    others = [row for row in rows if row.network != "loopback"]
    chosen = "\n".join(f"* {row.model}, {row.network}: {row.otherwise}" for row in others)
    return PAGE.format(table=markdown(cells), chosen=chosen)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Where the seconds of each step go, and its measured time."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 3.5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        group = [row for row in rows if row.model == model][::-1]
        left = [0.0] * len(group)
        for label, values in (
            ("local work", [row.local for row in group]),
            ("rounds", [row.waiting.rounds for row in group]),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_models(parser)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[Row] = []
    for name, model, tokens, captured in captured_models(options):
        for network in options.networks:
            rows.append(measure(name, model, captured, tokens, network))
            print(rows[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "network.json").write_text(json.dumps([asdict(r) for r in rows], indent=1))
    (options.output / "network.md").write_text(table(rows))
    plot(rows, options.output / "network.png")


if __name__ == "__main__":
    main()
