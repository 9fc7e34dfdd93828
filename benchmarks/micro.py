"""Small measurements behind design choices: memory reuse, kernels, and the price of a round.

Prints the first table of docs/performance.md. Usage: python benchmarks/micro.py
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from runtime.correlations.prg import Prg, new_seed
from runtime.kernels.matmul import matmul_rows, set_threads
from runtime.memory import keep_freed_memory
from runtime.spec import CLIENT, DEALER, ROLES
from runtime.transport.communicator import CountingCommunicator
from runtime.transport.link import Link

REPEATS = 5
STREAM_BYTES = 1 << 26
ROWS, INNER, OUTER = 1, 576, 4096
ROUNDS, MESSAGE_BYTES = 2000, 1024


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
    """Bytes per second of mask words, each call into memory of its own."""
    prg = Prg(new_seed())
    return STREAM_BYTES / seconds(lambda: prg.read(STREAM_BYTES))


def stream_rates() -> tuple[float, float]:
    """With the C library's default settings, and with freed memory kept (in a fresh process)."""
    default = float(_again("stream").communicate()[0])
    keep_freed_memory()
    return default, stream_rate()


def _again(*arguments: str) -> subprocess.Popen[str]:
    """This script as another process that does one thing and prints what it found."""
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True
    )


def round_rates() -> list[float]:
    """Rounds per second of two processes: by gloo's messages, and by our link."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    parties = [_again("round", role, address) for role in ROLES]
    outputs = [party.communicate()[0] for party in parties]
    return [float(rate) for rate in outputs[CLIENT].split()]


def play_rounds(role: str, address: str) -> None:
    """One role's part: messages of one kilobyte both ways."""
    torch.set_num_threads(1)
    communicator = CountingCommunicator.join(role, address)
    if communicator.rank != DEALER:
        mine, theirs = (torch.zeros(MESSAGE_BYTES, dtype=torch.uint8) for _ in range(2))
        peer, link = communicator.peer, Link(communicator)

        def by_gloo() -> None:
            works = communicator.isend(mine, peer), communicator.irecv(theirs, peer)
            communicator.wait(peer, *works)

        for once in (by_gloo, lambda: link.exchange(mine, MESSAGE_BYTES)):
            print(ROUNDS / seconds(lambda once=once: [once() for _ in range(ROUNDS)]))
    communicator.leave()


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


def main() -> None:
    plain, kept = stream_rates()
    set_threads(1)
    torch.set_num_threads(1)
    library, wide, narrow = matmul_rates()
    gloo, link = round_rates()
    print("| what | rate | against the first |\n| --- | ---: | ---: |")
    print(f"| mask words, default memory settings | {plain / 1e9:.2f} GB/s | 1 |")
    print(f"| mask words, freed memory kept | {kept / 1e9:.2f} GB/s | {kept / plain:.1f} |")
    print(f"| int64 product at one row, torch | {library / 1e9:.2f} GMAC/s | 1 |")
    print(f"| the same, our kernel | {wide / 1e9:.2f} GMAC/s | {wide / library:.1f} |")
    print(f"| the same, int32 weights | {narrow / 1e9:.2f} GMAC/s | {narrow / library:.1f} |")
    print(f"| rounds on loopback, gloo | {gloo:,.0f} per s | 1 |")
    print(f"| rounds on loopback, our link | {link:,.0f} per s | {link / gloo:.1f} |")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["stream"]:
            print(stream_rate())
        case ["round", role, address]:
            play_rounds(role, address)
        case _:
            main()
