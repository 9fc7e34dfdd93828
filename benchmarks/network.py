"""A decode step on emulated networks: each program on the network that it was compiled for.

The link between client and server is slowed down in the transport (`runtime.transport.emulated`): a
message is delivered when the profile's latency and bandwidth would have delivered it. The parties
send the same data as on a real network; the dealer's stream is not slowed down. This requires no
network namespaces with tc netem, for which the kernel needs the netem module.

Usage: python benchmarks/network.py [gpt2-base | smollm2-135m] [--layers N]
"""

from __future__ import annotations

import argparse

from bench import MODELS, shortened, steps_of
from harness import Taken, run
from rich.console import Console
from rich.table import Table

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.backend.cost import cost_report
from mergec.runtime.core.network import NETWORKS

STEP = (1, 128)
"""New and past tokens."""

REVEALS = ("logits", "token")


def measure(model: str, layers: int | None, reveal: str, network: str) -> tuple[Program, Taken]:
    """Compile a model for a network, and run a step on it."""
    module, tokens = MODELS[model]()
    if layers is not None:
        module = shortened(module, layers)
    program = compile_decoder(module, config=CompileConfig(reveal=reveal, network=network))
    (taken,) = run(
        program.roles, steps_of(program, tokens, [STEP], repeats=3), "mergec", network=network
    )
    return program, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="first layers of the model only")
    options = parser.parse_args()
    table = Table("network", "reveal", "rounds", "online MB", "network, estimated s", "measured s")
    for network, profile in NETWORKS.items():
        for reveal in REVEALS:
            program, taken = measure(options.model, options.layers, reveal, network)
            estimate = profile.seconds(cost_report(program.any_role, *STEP).total)
            table.add_row(
                network,
                reveal,
                f"{taken.rounds:,}",
                f"{taken.online / 1e6:.2f}",
                f"{estimate:.2f}",
                f"{taken.seconds:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
