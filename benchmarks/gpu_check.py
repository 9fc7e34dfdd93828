"""Everything that wants a GPU, in one run of under eight minutes: `make gpu-check`.

Compares the kernels with the CPU's words, runs sessions with all three roles on the device, and
measures kernels and steps. Each part is a process of its own with a limit, so one that fails or
hangs costs its own part. Writes what was seen into docs/cuda.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"
SEEDS = bytes(range(32)), bytes(range(32, 64))

LIMITS = {
    "kernels": 120.0, "session": 40.0, "rates": 45.0, "gpt2": 75.0, "smollm2": 90.0,
    "llama-1b": 60.0, "crypten": 45.0,
}  # fmt: skip
"""Seconds of each part: 475 in all."""


def kernels() -> list[str]:
    """Calls of every hot loop, on the GPU and on the CPU."""
    command = [sys.executable, "-m", "tests.kernels.cases", "--device", "cuda", "--full"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() + done.stderr.splitlines()[-5:]
    calls = sum(int(line.split(": ")[1].split()[0]) for line in lines if line.endswith(" s"))
    if done.returncode:
        return ["kernels DIFFER from the CPU's words:", *lines]
    return [f"{calls} calls of {len(lines)} kernels give the words of the CPU."]


def session() -> list[str]:
    """A small decoder with all roles on the GPU, guarded against hidden copies."""
    from mergec.runtime.core.spec import ROLES
    from mergec.runtime.kernels.transfers import GUARD
    from mergec.runtime.roles.inprocess import InProcessSession
    from tests import decoder

    os.environ[GUARD] = "1"
    lines = []
    for shift in ("pairs", "slots-6"):
        programs = {role: decoder.program(role, shift=shift) for role in ROLES}
        found = []
        for device in ("cpu", "cuda"):
            with InProcessSession(programs, device, SEEDS) as running:
                found.append([running.step(*step).cpu() for step in (([5, 1, 7], 0), ([2], 3))])
        same = all(torch.equal(*pair) for pair in zip(*found, strict=True))
        seen = "those" if same else "NOT those"
        lines.append(f"logits of a small decoder, shift by {shift}: {seen} of the CPU.")
    return lines


def _seconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Least time of a call, after one to compile it."""
    work()
    torch.cuda.synchronize()
    least = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        least = min(least, time.perf_counter() - began)
    return least


def rates() -> list[str]:
    """Throughput of kernels beside what the card can do."""
    import numpy as np

    from mergec.runtime.correlations.dpf import Generator
    from mergec.runtime.correlations.prg import DevicePrg
    from mergec.runtime.kernels.matmul import matmul_rows
    from mergec.runtime.ops.silu import SILU
    from mergec.runtime.protocols.interval import _VALUES, fit
    from mergec.runtime.protocols.pieces import Pieces

    device = torch.device("cuda")
    draw = DevicePrg(SEEDS[0], device)
    source = torch.empty(1 << 28, dtype=torch.int32, device=device)
    copied = 2 * source.nbytes / _seconds(lambda: source.clone())
    lines = [f"copy: {copied / 1e9:.0f} GB/s read and written"]
    weight = draw.tensor((16_384, 4096), torch.int32)
    for rows in (1, 64, 256):
        x = draw.tensor((rows, 4096), torch.int64)
        taken = _seconds(lambda x=x: matmul_rows(x, weight))
        lines.append(
            f"{rows} rows times 16,384 x 4,096 int32: {1e3 * taken:.2f} ms, "
            f"{weight.nbytes / taken / 1e9:.0f} GB/s of weights, "
            f"{rows * weight.numel() / taken / 1e12:.2f} T multiply-adds a second"
        )
    size = 1 << 28
    taken = _seconds(lambda: DevicePrg(SEEDS[1], device).read(size), 3)
    lines.append(f"AES-256 stream: {size / taken / 1e9:.1f} GB/s")
    table = fit(np.sin, 16, 0, 128, 14, 57)
    count = 1 << 14
    points, roots = draw.tensor((count,), torch.int64), draw.tensor((count, 2), torch.int64)
    words = draw.tensor((count, 18), torch.int64)
    generator = Generator(2)
    taken = _seconds(lambda: _VALUES(points, roots, words, table, 0, generator), 3)
    lines.append(f"trees of 128 leaves: {count / taken / 1e6:.2f} million a second")
    pieces, count = SILU.from_server(9).table, 1 << 15
    assert isinstance(pieces, Pieces)
    mask, share = (
        draw.tensor(shape, dtype)
        for shape, dtype in (((count,), torch.int32), ((count, pieces.dealt_bytes), torch.uint8))
    )
    taken = _seconds(lambda: pieces._correct(mask, share))
    lines.append(f"tables for the server alone: {count / taken / 1e6:.2f} million dealt a second")
    return lines


def _steps(model: Any, tokens: list[int], prompts: tuple[int, ...]) -> list[str]:
    """Prompts and a decode step after each, with a profile of the last."""
    import mergec
    from mergec.compiler.program import Program
    from mergec.runtime.roles.inprocess import InProcessSession

    began = time.perf_counter()
    program: Program = mergec.compile_decoder(model, None, mergec.CompileConfig(max_length=512))
    lines = [f"compiled in {time.perf_counter() - began:.0f} s"]
    with InProcessSession(program.roles, "cuda") as running:
        for length in prompts:
            taken = []
            for _ in range(2):  # The first one compiles kernels.
                began = time.perf_counter()
                running.step(tokens[:length], 0)
                taken.append(time.perf_counter() - began)
            lines.append(f"prompt of {length}: {taken[0]:.2f} s, then {taken[1]:.2f} s")
            taken = []
            for i in range(4):
                began = time.perf_counter()
                running.step([tokens[i]], length + i)
                taken.append(time.perf_counter() - began)
            lines.append(f"decode after {length}: {min(taken):.3f} s")
        lines += _profile(lambda: running.step([tokens[9]], prompts[-1] + 4))
    peak = torch.cuda.max_memory_allocated() / 1e9
    return [*lines, f"memory of all three roles on the device: {peak:.1f} GB"]


def _profile(work: Callable[[], Any]) -> list[str]:
    """Time in kernels, launches and copies of a call, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    whole = time.perf_counter() - began
    events = [event for event in seen.events() if str(event.device_type).endswith("CUDA")]
    copies = [event for event in events if "Mem" in event.name]
    busy, moved = (sum(e.time_range.elapsed_us() for e in some) / 1e6 for some in (events, copies))
    by_name: dict[str, float] = {}
    for event in events:
        by_name[event.name] = by_name.get(event.name, 0.0) + event.time_range.elapsed_us()
    longest = sorted(by_name.items(), key=lambda pair: -pair[1])[:6]
    names = ", ".join(f"{name[:40]} {us / 1e3:.1f} ms" for name, us in longest)
    return [
        f"a decode step under the profiler: {whole:.3f} s",
        f"{busy - moved:.3f} s of it in {len(events) - len(copies)} kernels",
        f"{moved:.3f} s of it in {len(copies)} copies",
        f"the longest: {names}",
    ]


def gpt2() -> list[str]:
    """GPT-2-base with random weights."""
    import bench

    return _steps(*bench.gpt2(), (64,))


def smollm2() -> list[str]:
    """SmolLM2-135M-Instruct."""
    import bench

    return _steps(*bench.smollm2(), (64, 256))


def llama_1b() -> list[str]:
    """A Llama of the shape of 1.2 billion parameters, random weights."""
    import bench

    model, tokens = bench._random(
        "llama", vocab_size=32_000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    return _steps(model, tokens, (64,))


def crypten() -> list[str]:
    """CrypTen's stock protocols on CUDA, for a small Llama."""
    import bench

    import mergec

    model, _ = bench.small_llama()
    config = mergec.CompileConfig(max_length=128, weights="shared")
    with tempfile.TemporaryDirectory(prefix="mergec-gpu-") as folder:
        mergec.compile_decoder(model, None, config).save(folder)
        return _stock(folder)


def _stock(folder: str) -> list[str]:
    command = [
        sys.executable, "-m", "mergec", "run", folder, "--prompt", "5 6 7 8", "--max-tokens",
        "2", "--mode", "crypten", "--device", "cuda",
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - began
    if done.returncode:
        return [f"it ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}"]
    return [f"a prompt of 4 and 2 tokens of a small Llama: {taken:.1f} s with start-up"]


PARTS: dict[str, Callable[[], list[str]]] = {
    "kernels": kernels, "session": session, "rates": rates, "gpt2": gpt2, "smollm2": smollm2,
    "llama-1b": llama_1b, "crypten": crypten,
}  # fmt: skip


def _part(name: str) -> list[str]:
    """Run a part in a process of its own, up to its limit."""
    command = [sys.executable, __file__, "--part", name]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMITS[name]
        )
    except subprocess.TimeoutExpired:
        return [f"stopped after {LIMITS[name]:.0f} s"]
    if done.returncode:
        return ["failed: " + (done.stderr.strip().splitlines() or ["without a word"])[-1]]
    lines: list[str] = json.loads(done.stdout.splitlines()[-1])
    return lines


def page(text: str, lines: list[str]) -> str:
    """The page with what was seen between its marks. Raises ValueError if they are missing."""
    before, found, rest = text.partition(BEGIN)
    _, again, after = rest.partition(END)
    if not found or not again:
        raise ValueError(f"{PAGE} lacks the lines {BEGIN} and {END}")
    return "\n".join([before + BEGIN, *lines, END + after])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="run one part and print what it found")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing was checked", file=sys.stderr)
        return 2
    if options.part:
        print(json.dumps(PARTS[options.part]()))
        return 0
    name = torch.cuda.get_device_name()
    lines = ["", f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.", ""]
    failed = 0
    for part, work in PARTS.items():
        found = _part(part)
        failed += any(word in found[0] for word in ("DIFFER", "NOT", "failed", "stopped"))
        print(f"{part}: " + "\n  ".join(found), flush=True)
        lines += [f"**{part}.** {work.__doc__}", "", *(f"* {line}" for line in found), ""]
        PAGE.write_text(page(PAGE.read_text(), lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
