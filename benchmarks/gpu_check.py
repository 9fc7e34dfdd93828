"""Everything that wants a GPU, in one run of under eight minutes: `make gpu-check`.

Compares the kernels with the CPU's words, runs sessions with all three roles on the device, and
measures kernels and steps. Each part is a process of its own with a limit, and says what it sees as
it sees it. So one that fails or hangs costs the rest of its own part, and nothing that it started
goes on behind it. Writes what was seen into docs/cuda.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

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


KERNELS_LIMIT = 110.0
"""Seconds after which kernels are stopped that have no result, which then are named."""


class Seen(NamedTuple):
    """A line of what was seen. bad: whether it tells of something that is wrong."""

    text: str
    bad: bool = False


def kernels() -> Iterator[Seen]:
    """Calls of every hot loop, on the GPU and on the CPU."""
    from mergec.runtime.kernels.backends import KERNELS
    from tests.kernels.cases import CASES  # registers the kernels

    # Those that walk through trees take longest to compile, and stand next to each other.
    names = sorted(CASES, key=lambda name: (name.startswith(("logarithm.", "trees.")), name))
    count = min(8, os.cpu_count() or 1)
    shares = [names[first::count] for first in range(count)]
    yield from compared(shares, ("--device", "cuda", "--full"), KERNELS_LIMIT)
    torch_alone = [name for name, kernel in KERNELS.items() if not kernel.has_triton]
    yield Seen(f"{len(torch_alone)} of them are a few launches of torch each.")


def compared(shares: Sequence[Sequence[str]], options: Sequence[str], limit: float) -> list[Seen]:
    """What calls of these kernels give, each share in a process of its own, within `limit` s."""
    command = [sys.executable, "-m", "tests.kernels.cases", *options, "--only"]
    with tempfile.TemporaryDirectory(prefix="mergec-gpu-") as folder:
        files = [Path(folder) / str(number) for number in range(len(shares))]
        running = []
        for file, share in zip(files, shares, strict=True):
            with file.open("wb") as out:
                running.append(
                    subprocess.Popen([*command, *share], cwd=ROOT, stdout=out, stderr=out)
                )
        deadline = time.monotonic() + limit
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        lines = [line for file in files for line in file.read_text().splitlines()]
    wanted = {name for share in shares for name in share}
    said = [line for line in lines if line.partition(":")[0] in wanted]
    done = [line for line in said if line.endswith(" s") and " calls, " in line]
    wrong = [line for line in said if line not in done]
    silent = wanted - {line.partition(":")[0] for line in said}
    calls = sum(int(line.split(": ")[1].split()[0]) for line in done)
    found = [Seen(f"{line}", bad=True) for line in wrong]
    if silent:
        found.append(Seen(f"no result within {limit:.0f} s: {', '.join(sorted(silent))}", bad=True))
    if silent and not said and lines:
        found.append(Seen(lines[-1], bad=True))
    good = {line.partition(":")[0] for line in done} - {line.partition(":")[0] for line in wrong}
    return [
        Seen(f"{calls} calls; {len(good)} of {len(wanted)} kernels give the CPU's words."),
        *found,
    ]


def session() -> Iterator[Seen]:
    """A small decoder with all roles on the GPU, guarded against hidden copies."""
    from mergec.runtime.core.spec import ROLES
    from mergec.runtime.kernels.transfers import GUARD
    from mergec.runtime.roles.inprocess import InProcessSession
    from tests import decoder

    os.environ[GUARD] = "1"
    for shift in ("pairs", "slots-6", "log-6"):
        programs = {role: decoder.program(role, shift=shift) for role in ROLES}
        found = []
        for device in ("cpu", "cuda"):
            with InProcessSession(programs, device, SEEDS) as running:
                found.append([running.step(*step).cpu() for step in (([5, 1, 7], 0), ([2], 3))])
        same = all(torch.equal(*pair) for pair in zip(*found, strict=True))
        which = "those" if same else "not those"
        yield Seen(f"logits of a small decoder, shift by {shift}: {which} of the CPU.", not same)


def _seconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Least time of a call, after one to compile it."""
    work()
    _finish()
    least = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        _finish()
        least = min(least, time.perf_counter() - began)
    return least


def _finish() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rates() -> Iterator[Seen]:
    """Throughput of kernels beside that of a copy, which is what memory allows."""
    yield from rates_on(torch.device("cuda"), 1 << 28)


def rates_on(device: torch.device, size: int) -> Iterator[Seen]:
    """Rates of calls that take a time in proportion to `size`."""
    import numpy as np

    from mergec.runtime.correlations.dpf import Generator
    from mergec.runtime.correlations.prg import DevicePrg
    from mergec.runtime.kernels.matmul import matmul, matmul_rows
    from mergec.runtime.ops.silu import SILU
    from mergec.runtime.protocols.interval import _VALUES, fit
    from mergec.runtime.protocols.pieces import Pieces
    from mergec.runtime.protocols.truncate import _TRUNCATED

    draw = DevicePrg(SEEDS[0], device)
    source = torch.empty(size, dtype=torch.int32, device=device)
    copied = 2 * source.nbytes / _seconds(lambda: source.clone())
    yield Seen(f"copy: {copied / 1e9:.0f} GB/s read and written")

    def of_memory(moved: float, taken: float) -> str:
        return f"{moved / taken / 1e9:.0f} GB/s, {100 * moved / taken / copied:.0f}% of the copy"

    weight = draw.tensor((size >> 14, 4096), torch.int32)
    for rows in (1, 64, 256):
        x = draw.tensor((rows, 4096), torch.int64)
        taken = _seconds(lambda x=x: matmul_rows(x, weight))
        yield Seen(
            f"{rows} rows times {len(weight):,} x 4,096 int32: {1e3 * taken:.2f} ms, "
            f"{of_memory(weight.nbytes, taken)}, "
            f"{rows * weight.numel() / taken / 1e12:.2f} T multiply-adds a second"
        )
    cache = draw.tensor((1, 32, size >> 15, 64), torch.int64)
    query = draw.tensor((1, 32, 1, 64), torch.int64)
    taken = _seconds(lambda: matmul(query, cache.mT))
    yield Seen(
        f"scores of a token with {cache.shape[2]:,} cached: {of_memory(cache.nbytes, taken)}"
    )
    count = size >> 4
    opened, dealt = draw.tensor((count,), torch.int64), draw.tensor((2, count), torch.int64)
    taken = _seconds(lambda: _TRUNCATED(opened, dealt, 16, True))
    yield Seen(f"{count:,} truncations: {of_memory(32 * count, taken)}")
    taken = _seconds(lambda: DevicePrg(SEEDS[1], device).read(size), 3)
    yield Seen(
        f"AES-256 stream: {size / taken / 1e9:.1f} GB/s, {size / 16 / taken / 1e9:.2f} G blocks/s"
    )
    table, count = fit(np.sin, 16, 0, 128, 14, 57), size >> 14
    points, roots = draw.tensor((count,), torch.int64), draw.tensor((count, 2), torch.int64)
    words = draw.tensor((count, 18), torch.int64)
    generator = Generator(2)
    taken = _seconds(lambda: _VALUES(points, roots, words, table, 0, generator), 3)
    yield Seen(f"trees of 128 leaves: {count / taken / 1e6:.2f} million a second")
    pieces, count = SILU.from_server(9).table, size >> 13
    assert isinstance(pieces, Pieces)
    mask, share = (
        draw.tensor(shape, dtype)
        for shape, dtype in (((count,), torch.int32), ((count, pieces.dealt_bytes), torch.uint8))
    )
    taken = _seconds(lambda: pieces._correct(mask, share))
    yield Seen(f"tables for the server alone: {count / taken / 1e6:.2f} million dealt a second")


def _steps(
    model: Any, tokens: list[int], prompts: tuple[int, ...], device: str = "cuda"
) -> Iterator[Seen]:
    """Prompts and a decode step after each, with a profile of the last."""
    import mergec
    from mergec.compiler.program import Program
    from mergec.runtime.roles.inprocess import InProcessSession

    began = time.perf_counter()
    program: Program = mergec.compile_decoder(model, None, mergec.CompileConfig(max_length=512))
    yield Seen(f"compiled in {time.perf_counter() - began:.0f} s")
    with InProcessSession(program.roles, device) as running:
        for length in prompts:
            taken = []
            for _ in range(2):  # The first one compiles kernels.
                began = time.perf_counter()
                running.step(tokens[:length], 0)
                taken.append(time.perf_counter() - began)
            yield Seen(f"prompt of {length}: {taken[0]:.2f} s, then {taken[1]:.2f} s")
            taken = []
            for i in range(4):
                began = time.perf_counter()
                running.step([tokens[i]], length + i)
                taken.append(time.perf_counter() - began)
            yield Seen(f"decode after {length}: {min(taken):.3f} s")
        yield from _profile(lambda: running.step([tokens[9]], prompts[-1] + 4))
    peak = torch.cuda.max_memory_allocated() / 1e9
    yield Seen(f"memory of all three roles on the device: {peak:.1f} GB")


def _profile(work: Callable[[], Any]) -> Iterator[Seen]:
    """Time in kernels, launches and copies of a call, and of waiting, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        _finish()
    whole = time.perf_counter() - began
    events = [event for event in seen.events() if str(event.device_type).endswith("CUDA")]
    copies = [event for event in events if "Mem" in event.name]
    busy, moved = (sum(e.time_range.elapsed_us() for e in some) / 1e6 for some in (events, copies))
    by_name: dict[str, float] = {}
    for event in events:
        by_name[event.name] = by_name.get(event.name, 0.0) + event.time_range.elapsed_us()
    longest = sorted(by_name.items(), key=lambda pair: -pair[1])[:6]
    names = ", ".join(f"{name[:40]} {us / 1e3:.1f} ms" for name, us in longest)
    yield Seen(f"a decode step under the profiler: {whole:.3f} s")
    yield Seen(f"{busy - moved:.3f} s of it in {len(events) - len(copies)} kernels")
    yield Seen(f"{moved:.3f} s of it in {len(copies)} copies")
    yield Seen(f"{max(0.0, whole - busy):.3f} s of it the device waited")
    yield Seen(f"the longest: {names}")


def gpt2() -> Iterator[Seen]:
    """GPT-2-base with random weights."""
    import bench

    return _steps(*bench.gpt2(), (64, 256))


def smollm2() -> Iterator[Seen]:
    """SmolLM2-135M-Instruct."""
    import bench

    return _steps(*bench.smollm2(), (64, 256))


def llama_1b() -> Iterator[Seen]:
    """A Llama of the shape of 1.2 billion parameters, random weights."""
    import bench

    model, tokens = bench._random(
        "llama", vocab_size=32_000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    return _steps(model, tokens, (64,))


def crypten() -> Iterator[Seen]:
    """CrypTen's stock protocols on CUDA, for a small Llama."""
    import bench

    import mergec

    model, _ = bench.small_llama()
    config = mergec.CompileConfig(max_length=128, weights="shared")
    with tempfile.TemporaryDirectory(prefix="mergec-gpu-") as folder:
        mergec.compile_decoder(model, None, config).save(folder)
        yield _stock(folder)


def _stock(folder: str) -> Seen:
    command = [
        sys.executable, "-m", "mergec", "run", folder, "--prompt", "5 6 7 8", "--max-tokens",
        "2", "--mode", "crypten", "--device", "cuda",
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - began
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return Seen(f"it ended with {done.returncode}: {why}", bad=True)
    return Seen(f"a prompt of 4 and 2 tokens of a small Llama: {taken:.1f} s with start-up")


PARTS: dict[str, Callable[[], Iterator[Seen]]] = {
    "kernels": kernels, "session": session, "rates": rates, "gpt2": gpt2, "smollm2": smollm2,
    "llama-1b": llama_1b, "crypten": crypten,
}  # fmt: skip


def watched(command: Sequence[str], limit: float) -> list[Seen]:
    """What a part said, as a process that is stopped after `limit` seconds with all it started."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=errors, start_new_session=True
        )
        last = []
        try:
            code = process.wait(limit)
            if code:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                why = lines[-1] if lines else f"exit code {code}"
                last.append(Seen(f"failed: {why}", bad=True))
        except subprocess.TimeoutExpired:
            last.append(Seen(f"stopped after {limit:.0f} s", bad=True))
        finally:
            # Roles of a part that was stopped would slow the next one down.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return [*_read(said.read().decode(errors="replace")), *last]


def _read(text: str) -> Iterator[Seen]:
    """The lines of a part; the rest of what it prints is of no matter."""
    for line in text.splitlines():
        with suppress(ValueError, TypeError):
            yield Seen(*json.loads(line))


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
        for seen in PARTS[options.part]():
            print(json.dumps(seen), flush=True)
        return 0
    name = torch.cuda.get_device_name()
    lines = ["", f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.", ""]
    failed = False
    for part, work in PARTS.items():
        found = watched([sys.executable, __file__, "--part", part], LIMITS[part])
        failed = failed or any(seen.bad for seen in found) or not found
        print(f"{part}: " + "\n  ".join(seen.text for seen in found), flush=True)
        shown = [f"* **{seen.text}**" if seen.bad else f"* {seen.text}" for seen in found]
        lines += [f"**{part}.** {work.__doc__}", "", *shown, ""]
        PAGE.write_text(page(PAGE.read_text(), lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
