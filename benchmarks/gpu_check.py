"""Everything that wants a GPU, in one run of under eight minutes: `make gpu-check`.

Compares the kernels with the CPU's words, runs sessions with all three roles on the device, and
measures kernels and steps. Each part is a process of its own with a limit, and says what it sees as
it sees it. So one that fails or hangs costs the rest of its own part, and nothing that it started
goes on behind it. Models are compiled by further processes, while the first parts run. Writes what
was seen into docs/cuda.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import gpu_machine
import torch
from gpu_seen import Seen, brief, read

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"

BUILT = "models"
"""The phase that waits for the models, which are compiled from the beginning on."""

DISK = 20e9
"""Bytes that the models' bundles take together, at most."""


class Phase(NamedTuple):
    """Parts that run at the same time, and seconds for them.

    What earlier phases leave of their seconds is added.
    """

    parts: tuple[str, ...]
    limit: float


PHASES = (
    Phase(("warm-up",), 45.0),
    Phase(("kernels",), 90.0),
    Phase(("session", "protocols"), 45.0),
    Phase(("rates",), 40.0),
    Phase((BUILT,), 30.0),
    Phase(("guarded", "crypten"), 40.0),
    Phase(("demo",), 35.0),
    Phase(("loopback",), 40.0),
    Phase(("smollm2",), 40.0),
    Phase(("gpt2",), 30.0),
    Phase(("llama-1b",), 35.0),
)
"""470 seconds in all. What measures a time runs alone on the device."""


class Job(NamedTuple):
    """What a part is told: the seconds that it has, where the models are, and on what it runs."""

    limit: float
    root: Path
    device: str


GRACE = 8.0
"""Seconds before the end of a part at which its processes are stopped, to tell what they lack."""


def _shares(names: Sequence[str], most: int) -> list[list[str]]:
    count = max(1, min(most, gpu_machine.cores()))
    return [list(names[first::count]) for first in range(count)]


def warm_up(job: Job) -> Iterator[Seen]:
    """The CPU's kernels, which numba compiles, and with which the others are compared."""
    from tests.kernels.cases import CASES  # registers the kernels

    # The kernels that parties call are compiled by the first process, as a service does.
    code = "from mergec.runtime.roles.fork import prepare_to_fork; prepare_to_fork()"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    yield from compared(_shares(sorted(CASES), 8), ("--host",), job.limit, "run on the CPU")
    if first.wait():
        yield Seen("what services compile before they start did not compile", bad=True)


def kernels(job: Job) -> Iterator[Seen]:
    """Calls of every hot loop, on the GPU and on the CPU."""
    from mergec.runtime.kernels.backends import KERNELS
    from tests.kernels.cases import CASES

    # Those that walk through trees take longest to compile, and stand next to each other.
    names = sorted(CASES, key=lambda name: (name.startswith(("logarithm.", "trees.")), name))
    yield from compared(_shares(names, 12), ("--device", job.device, "--full"), job.limit)
    torch_alone = [name for name, kernel in KERNELS.items() if not kernel.has_triton]
    yield Seen(f"{len(torch_alone)} of them are a few launches of torch each.")


def compared(
    shares: Sequence[Sequence[str]],
    options: Sequence[str],
    limit: float,
    outcome: str = "give the CPU's words",
) -> list[Seen]:
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
        Seen(f"{calls} calls; {len(good)} of {len(wanted)} kernels {outcome}."),
        *found,
    ]


def session(job: Job) -> Iterator[Seen]:
    """A small decoder in guarded sessions: all roles on the GPU, and a client on the CPU."""
    import gpu_steps

    return gpu_steps.small(job.device)


def protocols(job: Job) -> Iterator[Seen]:
    """Protocols that this decoder does not run, on the GPU and on the CPU, in a guard."""
    from tests.kernels.protocol_calls import CASES, compared

    right = 0
    for name in CASES:
        try:
            outcome, good = compared(name, job.device, torch.inference_mode)
        except Exception as error:  # noqa: BLE001  (one that fails is not the last one)
            outcome, good = brief(error), False
        right += good
        if not good:
            yield Seen(f"{name}: {outcome}", bad=True)
    yield Seen(f"{right} of {len(CASES)} protocols give the CPU's words, and copy nothing unsaid.")


def rates(job: Job) -> Iterator[Seen]:
    """Throughput of each Triton kernel, beside what the card allows."""
    import gpu_rates

    size = 1 << 28 if job.device == "cuda" else 1 << 16
    return gpu_rates.rates_on(torch.device(job.device), size)


def guarded(job: Job) -> Iterator[Seen]:
    """A prompt and a decode step of GPT-2, guarded against hidden copies."""
    import gpu_steps

    return gpu_steps.guarded_model("gpt2", job.root, job.device)


def crypten(job: Job) -> Iterator[Seen]:
    """CrypTen's stock protocols on CUDA, for a small Llama."""
    import gpu_steps

    return gpu_steps.stock("small", job.root, job.device)


def demo(job: Job) -> Iterator[Seen]:
    """The demo: three processes answer, all roles on the device."""
    import gpu_steps

    return gpu_steps.demo("smollm2", job.root, job.device)


def loopback(job: Job) -> Iterator[Seen]:
    """A client, a server and a dealer, all on the device, over TCP of loopback."""
    import gpu_steps

    return gpu_steps.loopback("smollm2", job.root, job.device)


def smollm2(job: Job) -> Iterator[Seen]:
    """SmolLM2's steps in one process, and where their time goes."""
    import gpu_steps

    return gpu_steps.profiled_steps("smollm2", job.root, job.device)


def gpt2(job: Job) -> Iterator[Seen]:
    """GPT-2-base's steps in one process, and where their time goes."""
    import gpu_steps

    return gpu_steps.profiled_steps("gpt2", job.root, job.device)


def llama_1b(job: Job) -> Iterator[Seen]:
    """A Llama of 1.2 billion parameters, in three processes that share the device."""
    import gpu_models
    import gpu_steps

    known = gpu_models.facts("llama-1b", job.root)
    free, _ = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    why = gpu_steps.fits(known["parameters"], free) if known is not None else ""
    if why:
        yield Seen(why)
        return
    yield from gpu_steps.local("llama-1b", job.root, job.device, 64)


PARTS: dict[str, Callable[[Job], Iterator[Seen]]] = {
    "warm-up": warm_up, "kernels": kernels, "session": session, "protocols": protocols,
    "rates": rates, "guarded": guarded, "crypten": crypten, "demo": demo, "loopback": loopback,
    "smollm2": smollm2, "gpt2": gpt2, "llama-1b": llama_1b,
}  # fmt: skip


_RUNNING: list[subprocess.Popen[bytes]] = []
"""Parts that run now, each the first process of its group."""


def watched(
    command: Sequence[str], limit: float, environment: dict[str, str] | None = None
) -> list[Seen]:
    """What a part said, as a process that is stopped after `limit` seconds with all it started."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=errors, start_new_session=True, env=environment
        )
        _RUNNING.append(process)
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
            _kill(process)
            process.wait()
            _RUNNING.remove(process)
        said.seek(0)
        return [*read(said.read().decode(errors="replace")), *last]


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Ends what runs when this is left by an error, such as Ctrl-C or an end from outside."""
    try:
        yield
    except BaseException:
        for process in [*_RUNNING]:
            _kill(process)
        raise


def _environment(threads: int, root: Path) -> dict[str, str]:
    """Where parts run: how many threads a process has, and where Triton keeps what it compiled."""
    found = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    found["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if not os.access(Path.home(), os.W_OK):
        found.setdefault("TRITON_CACHE_DIR", str(root / "triton"))
        found.setdefault("NUMBA_CACHE_DIR", str(root / "numba"))
    return found


class Builds:
    """Processes that compile the models, from now until they are waited for."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(names)))
        limit = sum(phase.limit for phase in PHASES[: _place(BUILT) + 1])
        environment = _environment(max(1, gpu_machine.cores() // 4), root)
        command = [sys.executable, __file__, "--folder", str(root), "--build"]
        self._found = {
            name: self._pool.submit(watched, [*command, name], limit, environment) for name in names
        }

    def wait(self) -> list[Seen]:
        """What they said; all have ended when this returns."""
        return [
            Seen(f"{name}: {seen.text}", bad=True) if seen.bad else seen
            for name, found in self._found.items()
            for seen in found.result()
        ]


def _place(part: str) -> int:
    return next(i for i, phase in enumerate(PHASES) if part in phase.parts)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for the models: in memory if there is room, else where temporary files are."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > 2 * DISK
    with tempfile.TemporaryDirectory(
        prefix="mergec-gpu-", dir=memory if room else None, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def run_phase(
    phase: Phase, job: Job, left_out: set[str], builds: Builds | None
) -> dict[str, list[Seen]]:
    """What each part of a phase said; parts that are left out say nothing."""
    if BUILT in phase.parts:
        return {BUILT: builds.wait()} if builds is not None else {}
    parts = [part for part in phase.parts if part not in left_out]
    # Those that start many processes need one thread in each.
    threads = 1 if {"warm-up", "kernels"} & set(parts) else max(1, gpu_machine.cores() // 4)
    environment = _environment(threads, job.root)
    command = [
        sys.executable, __file__, "--limit", f"{job.limit:.1f}", "--folder", str(job.root),
        "--device", job.device, "--part",
    ]  # fmt: skip
    with ThreadPoolExecutor(max_workers=max(1, len(parts))) as pool, _nothing_left():
        found = [pool.submit(watched, [*command, part], job.limit, environment) for part in parts]
        return {part: each.result() for part, each in zip(parts, found, strict=True)}


def page(text: str, lines: list[str]) -> str:
    """The page with what was seen between its marks. Raises ValueError if they are missing."""
    before, found, rest = text.partition(BEGIN)
    _, again, after = rest.partition(END)
    if not found or not again:
        raise ValueError(f"{PAGE} lacks the lines {BEGIN} and {END}")
    return "\n".join([before + BEGIN, *lines, END + after])


def shown(part: str, what: str, found: Sequence[Seen]) -> list[str]:
    """What a part saw, for the page."""
    lines = [f"* **{seen.text}**" if seen.bad else f"* {seen.text}" for seen in found]
    return [f"**{part}.** {what}", "", *(lines or ["* **it said nothing**"]), ""]


def ran(lines: Sequence[str], right: Sequence[str], wrong: Sequence[str]) -> list[str]:
    """What has run, in sentences, for the top of the page's part."""
    told = ["It has run on a GPU, on real CUDA."]
    if right:
        told.append(f"Nothing went wrong in: {', '.join(right)}.")
    if wrong:
        told.append(f"Something did in: {', '.join(wrong)}; there it is in bold.")
    return ["", *lines, "", " ".join(told), ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="run one part and print what it found")
    parser.add_argument("--build", metavar="MODEL", help="make, compile and save one model")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the models are")
    parser.add_argument("--device", default="cuda", help="cpu: rehearse, and write no page")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that the part has")
    options = parser.parse_args()
    if options.build:
        import gpu_models

        for seen in gpu_models.build(options.build, options.folder):
            print(json.dumps(seen), flush=True)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing was checked", file=sys.stderr)
        return 2
    if options.part:
        limit = max(0.0, options.limit - GRACE)
        for seen in PARTS[options.part](Job(limit, options.folder, options.device)):
            print(json.dumps(seen), flush=True)
        return 0
    return check(options.device)


def check(device: str) -> int:
    """Run all parts, phase by phase, and write the page after each; returns the exit code."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    head = f"{gpu_machine.described(gpu_machine.machine())}; {time.strftime('%Y-%m-%d')}."
    lacks, left_out = gpu_machine.missing()
    print("\n".join([head, *lacks]), flush=True)
    top = [head, *(["", *(f"* {line}" for line in lacks)] if lacks else [])]
    parts: list[str] = []
    right: list[str] = []
    wrong: list[str] = []
    with _folder() as root, _nothing_left():
        builds = None
        if BUILT not in left_out:
            import gpu_models

            builds = Builds(root, [*gpu_models.MODELS])
        until = began
        for phase in PHASES:
            until += phase.limit
            start = time.monotonic()
            job = Job(max(phase.limit, until - start), root, device)
            found = run_phase(phase, job, left_out, builds)
            taken = time.monotonic() - start
            for part, said in found.items():
                bad = any(seen.bad for seen in said) or not said
                (wrong if bad else right).append(part)
                what = (PARTS[part].__doc__ or "") if part in PARTS else "Compiled meanwhile."
                print(f"{part}, {taken:.0f} s: " + "\n  ".join(s.text for s in said), flush=True)
                parts += shown(part, f"{what} It took {taken:.0f} s.", said)
            if device != "cpu":
                PAGE.write_text(page(PAGE.read_text(), [*ran(top, right, wrong), *parts]))
    print(f"all of it took {time.monotonic() - began:.0f} s", flush=True)
    return 1 if wrong or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
