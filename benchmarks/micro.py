"""Small measurements behind design choices: memory reuse, kernels, and the cost of a round.

Prints the first table of docs/performance.md. Usage: python benchmarks/micro.py
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from mergec.runtime.core.memory import keep_freed_memory
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER
from mergec.runtime.correlations.prg import Prg, new_seed
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.matmul import matmul_rows, set_threads
from mergec.runtime.ops import load_all
from mergec.runtime.transport.authority import make_certificates
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.connect import Security
from mergec.runtime.transport.lines import Lines, take

REPEATS = 5
STREAM_BYTES = 1 << 26
ROWS, INNER, OUTER = 1, 576, 4096
READ_INNER, READ_OUTER = 576, 100_000
ROUNDS, MESSAGE_BYTES = 5000, 1024
ELEMENTS, REACH = 1 << 16, 7
WAYS = "gloo", "plain", "tls"


def seconds(work: Callable[[], object]) -> float:
    """The median of several runs, after one that is not counted."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


def stream_rate() -> float:
    """Bytes of mask words per second, where each call allocates its memory."""
    prg = Prg(new_seed())
    return STREAM_BYTES / seconds(lambda: prg.read(STREAM_BYTES))


def stream_rates() -> tuple[float, float]:
    """With the C library's default settings, and with freed memory kept (in a fresh process)."""
    default = float(_again("stream").communicate()[0])
    keep_freed_memory()
    return default, stream_rate()


def _again(*arguments: str, lines: Sequence[int] = ()) -> subprocess.Popen[str]:
    """Start this script as another process that does one thing and prints its result."""
    command = [sys.executable, __file__, *arguments, *map(str, lines)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=lines)


def round_costs() -> list[float]:
    """CPU microseconds that client and server together spend on one round."""
    costs = []
    with tempfile.TemporaryDirectory(prefix="mergec-micro-") as folder:
        make_certificates(Path(folder))
        for way in WAYS:
            with Lines() as lines:
                parties = [
                    _again("round", way, role, folder, lines=lines.of(role))
                    for role in ROLES
                    if role != ROLES[DEALER]
                ]
            costs.append(sum(float(party.communicate()[0]) for party in parties))
    return costs


def play_rounds(way: str, role: str, folder: str, *lines: str) -> None:
    """One party's part: messages of one kilobyte in both directions."""
    torch.set_num_threads(1)
    peer = SERVER if role == ROLES[CLIENT] else CLIENT
    mine, theirs = (torch.zeros(MESSAGE_BYTES, dtype=torch.uint8) for _ in range(2))
    if way == "gloo":
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", store, rank=ROLES.index(role), world_size=2)

        def once() -> None:
            for work in (dist.isend(mine, peer), dist.irecv(theirs, peer)):
                work.wait()
    else:
        link = _link(way, role, folder, [int(line) for line in lines])

        def once() -> None:
            link.exchange(mine, MESSAGE_BYTES)

    for _ in range(ROUNDS // 10):
        once()
    before = time.process_time()
    for _ in range(ROUNDS):
        once()
    print(1e6 * (time.process_time() - before) / ROUNDS)


def _link(way: str, role: str, folder: str, lines: Sequence[int]) -> Channel:
    if way == "plain":
        return take(role, lines)[SERVER if role == ROLES[CLIENT] else CLIENT]
    # A party's first line connects it to the other party.
    line = socket.socket(fileno=lines[0])
    serves = role == ROLES[SERVER]
    context = Security(role, Path(folder)).context(listening=serves)
    assert context is not None
    return Channel(context.wrap_socket(line, server_side=serves), "other party")


def matmul_rates() -> tuple[float, float, float]:
    """Multiply-accumulates per second: torch int64, our kernel with int64 and int32 weights."""
    x = torch.randint(-(2**62), 2**62, (ROWS, INNER))
    wide = torch.randint(-(2**20), 2**20, (OUTER, INNER))
    narrow = wide.to(torch.int32)
    count = ROWS * INNER * OUTER
    return (
        count / seconds(lambda: x @ wide.T),
        count / seconds(lambda: matmul_rows(x, wide)),
        count / seconds(lambda: matmul_rows(x, narrow)),
    )


def read_rates() -> tuple[float, float, float]:
    """Bytes per second of weights that no cache holds: summed, and multiplied by one row.

    The products are with int64 and int32 weights.
    """
    x = torch.randint(-(2**62), 2**62, (1, READ_INNER))
    wide = torch.randint(-(2**20), 2**20, (READ_OUTER, READ_INNER))
    narrow = wide.to(torch.int32)
    words = wide.numpy()
    return (
        wide.nbytes / seconds(words.sum),
        wide.nbytes / seconds(lambda: matmul_rows(x, wide)),
        narrow.nbytes / seconds(lambda: matmul_rows(x, narrow)),
    )


def activation_cost(name: str, factors: int, *arguments: object) -> float:
    """Microseconds of all three roles, one after the other, for an element of an activation."""
    op, simulation = REGISTRY[name], Simulation()
    given = [simulation.share(torch.linspace(-9, 9, ELEMENTS)) for _ in range(factors)]

    def step() -> None:
        simulation.run(lambda ctx, party: op.protocol(ctx, *(x[party] for x in given), *arguments))

    return 1e6 * seconds(step) / ELEMENTS


def main() -> None:
    plain, kept = stream_rates()
    set_threads(1)
    torch.set_num_threads(1)
    library, wide, narrow = matmul_rates()
    summed, read_wide, read_narrow = read_rates()
    gloo, plain_round, tls_round = round_costs()
    load_all()
    activations = [
        (said, *(activation_cost(name, factors, argument, reach) for reach in (0, REACH)))
        for said, name, factors, argument in (
            ("a gated SiLU", "glu", 2, "silu"),
            ("a GELU", "gelu", 1, True),
        )
    ]
    print("| what | rate | against the first |\n| --- | ---: | ---: |")
    print(f"| mask words, default memory settings | {plain / 1e9:.2f} GB/s | 1 |")
    print(f"| mask words, freed memory kept | {kept / 1e9:.2f} GB/s | {kept / plain:.1f} |")
    print(f"| int64 product at one row, torch | {library / 1e9:.2f} GMAC/s | 1 |")
    print(f"| the same, our kernel | {wide / 1e9:.2f} GMAC/s | {wide / library:.1f} |")
    print(f"| the same, int32 weights | {narrow / 1e9:.2f} GMAC/s | {narrow / library:.1f} |")
    print(f"| int64 weights that no cache holds, summed | {summed / 1e9:.1f} GB/s | 1 |")
    for kind, rate in (("int64", read_wide), ("int32", read_narrow)):
        share = rate / summed
        print(f"| the same times a row, {kind} | {rate / 1e9:.1f} GB/s | {share:.2f} |")
    print(f"| a round, torch.distributed over gloo | {gloo:.0f} us of CPU | 1 |")
    for name, cost in (("our channel", plain_round), ("our channel, TLS 1.3", tls_round)):
        print(f"| the same, {name} | {cost:.0f} us of CPU | {cost / gloo:.2f} |")
    for said, keys, tables in activations:
        print(f"| an element of {said}, keys, all roles | {keys:.2f} us | 1 |")
        print(f"| the same, tables for the server alone | {tables:.2f} us | {tables / keys:.2f} |")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["stream"]:
            print(stream_rate())
        case ["round", *rest]:
            play_rounds(*rest)
        case _:
            main()
