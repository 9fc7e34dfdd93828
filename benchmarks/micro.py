"""Small measurements behind design choices: memory reuse, kernels, and the price of a round.

Prints a Markdown table for docs/performance.md. Usage: python benchmarks/micro.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from runtime.correlations.prg import Prg, new_seed
from runtime.kernels.matmul import matmul_rows, set_threads
from runtime.memory import keep_freed_memory

REPEATS = 5
STREAM_BYTES = 1 << 26
ROWS, INNER, OUTER = 1, 576, 4096


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
    if os.environ.get("MERGEC_MICRO"):
        print(stream_rate())
        raise SystemExit
    output = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "MERGEC_MICRO": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    keep_freed_memory()
    return float(output), stream_rate()


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
    print("| what | rate | against the first |\n| --- | ---: | ---: |")
    print(f"| mask words, default memory settings | {plain / 1e9:.2f} GB/s | 1 |")
    print(f"| mask words, freed memory kept | {kept / 1e9:.2f} GB/s | {kept / plain:.1f} |")
    print(f"| int64 product at one row, torch | {library / 1e9:.2f} GMAC/s | 1 |")
    print(f"| the same, our kernel | {wide / 1e9:.2f} GMAC/s | {wide / library:.1f} |")
    print(f"| the same, int32 weights | {narrow / 1e9:.2f} GMAC/s | {narrow / library:.1f} |")


if __name__ == "__main__":
    main()
