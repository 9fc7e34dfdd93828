"""Sessions of `gpu_check`: in a process, with a guard or a profile, and in three, over loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

import gpu_models
import torch
from gpu_seen import Seen

from mergec.runtime.core.errors import PeerEndedError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.kernels.transfers import GUARD
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.inprocess import InProcessSession

ROOT = Path(__file__).parents[1]
SEEDS = bytes(range(32)), bytes(range(32, 64))
START = 60.0
"""Seconds after which a service hangs that does not listen."""

GOALS = {
    ("smollm2", "decode"): 0.15, ("smollm2", "prompt of 256"): 3.0, ("llama-1b", "decode"): 0.5,
}  # fmt: skip
"""Seconds that a step should take at most, all roles on the card, over loopback."""

DECODED = 6
"""Tokens of an answer, of which the first comes with the prompt."""

GUARDED = 16
"""Tokens of a prompt that is compared with the CPU's."""

WORDS_OF_A_WEIGHT = 4 + 8 + 8
"""Bytes of a weight at the server, of W - B at the client, and of B at the dealer."""

ROOM = 3e9
"""Bytes of device memory for what is no weight: three contexts of CUDA, caches and masks."""


def timed(name: str, what: str, seconds: float) -> str:
    """Seconds of a step, beside the goal if there is one; a miss is bold."""
    goal = GOALS.get((name, what))
    if goal is None:
        return f"{what}: {seconds:.3f} s"
    said = f"{seconds:.3g} s (goal {goal:g})"
    return f"{what}: {said}" if seconds <= goal else f"{what}: **{said}**"


class Session(InProcessSession):
    """Raises the error that caused the others, not that of the role that lost its peer."""

    def _all(self, work: Callable[[int], Any]) -> list[Any]:
        errors: list[BaseException] = []

        def noted(party: int) -> Any:
            try:
                return work(party)
            except BaseException as error:
                errors.append(error)
                raise

        try:
            return super()._all(noted)
        except BaseException:
            if first := next((e for e in errors if not isinstance(e, PeerEndedError)), None):
                raise first from None
            raise


@contextmanager
def guarded() -> Iterator[None]:
    """Within, parties on a device run in a guard."""
    before = os.environ.get(GUARD)
    os.environ[GUARD] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[GUARD]
        else:
            os.environ[GUARD] = before


Places = str | tuple[str, str, str]


def same_logits(
    programs: Mapping[str, RoleProgram],
    steps: Sequence[tuple[Sequence[int], int]],
    places: Sequence[Places],
) -> list[bool]:
    """Whether a guarded session gives the CPU's logits, bit for bit, in each of these places.

    places: the device of all roles, or of client, server and dealer.
    """

    def logits(place: Places) -> torch.Tensor:
        with guarded(), Session(programs, place, SEEDS) as session:
            return torch.stack([session.step(*step).cpu() for step in steps])

    expected = logits("cpu")
    return [torch.equal(expected, logits(place)) for place in places]


def small(device: str) -> Iterator[Seen]:
    """A small decoder: with all roles on the device, and with the client on the CPU."""
    from tests import decoder

    places: list[Places] = [device, ("cpu", device, device)]
    for shift in ("pairs", "slots-6", "log-6"):
        programs = {role: decoder.program(role, shift=shift) for role in ROLES}
        found = same_logits(programs, (([5, 1, 7], 0), ([2], 3)), places)
        for same, where in zip(found, ("all roles on it", "the client on the CPU"), strict=True):
            which = "those" if same else "not those"
            yield Seen(
                f"logits of a small decoder, shift by {shift}, {where}: {which} of the CPU.",
                not same,
            )


Facts = dict[str, Any]


def of_model(steps: Callable[..., Iterator[Seen]]) -> Callable[..., Iterator[Seen]]:
    """Steps of a model, which are also given what is known of it; a line if it was not compiled."""

    @wraps(steps)
    def run(name: str, root: Path, *given: Any) -> Iterator[Seen]:
        facts = gpu_models.facts(name, root)
        if facts is None:
            yield Seen(f"left out: {name} was not compiled", bad=True)
            return
        yield from steps(facts, name, root, *given)

    return run


def loaded(name: str, root: Path) -> dict[str, RoleProgram]:
    """A model's programs, by role."""
    from mergec.runtime.program.bundle import load_bundle, role_path

    return {role: load_bundle(role_path(root / name, role), role) for role in ROLES}


@of_model
def guarded_model(facts: Facts, name: str, root: Path, device: str) -> Iterator[Seen]:
    """A prompt and a decode step of a model, in a guard."""
    programs = loaded(name, root)
    ids = gpu_models.tokens(facts["vocabulary"], GUARDED + 1)
    steps = (ids[:GUARDED], 0), (ids[GUARDED:], GUARDED)
    (same,) = same_logits(programs, steps, [device])
    what = f"logits of {facts['what']}, a prompt of {GUARDED} and a token"
    yield Seen(f"{what}: {'those' if same else 'not those'} of the CPU.", not same)


class Memory:
    """Samples how much of the device all processes take together."""

    def __init__(self) -> None:
        self.most = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._end.is_set():
            self._look()
            self._end.wait(0.2)

    def _look(self) -> None:
        free, total = torch.cuda.mem_get_info()
        self.most = max(self.most, total - free)

    def __enter__(self) -> Memory:
        if torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()

    def seen(self) -> Seen:
        return Seen(f"device memory in use, by all processes: {self.most / 1e9:.1f} GB at most")


def fits(parameters: int, free: int) -> str:
    """Why a model's three roles do not fit into the free bytes of a device; empty if they do."""
    needed = WORDS_OF_A_WEIGHT * parameters + ROOM
    if needed <= free:
        return ""
    return (
        f"it does not fit: three roles of {parameters / 1e9:.2f} billion parameters take "
        f"{needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB of device memory are free"
    )


@of_model
def demo(
    facts: Facts, name: str, root: Path, device: str, length: int = 64, answered: int = 16
) -> Iterator[Seen]:
    """Three processes answer, as in `mergec demo`, and the answer is compared with plaintext."""
    from mergec.compiler.program import Program

    yield Seen(f"the model: {facts['what']}")
    program = Program.load(root / name)
    prompt: Any = "What is multi-party computation? Answer in one sentence."
    if not facts["tokenizer"]:
        prompt = gpu_models.tokens(facts["vocabulary"], length)
    began = time.perf_counter()
    answer = program.generate_local(prompt, max_tokens=answered, device=device, temperature=0.0)
    whole = time.perf_counter() - began
    yield Seen(f"the answer: {answer.text or answer.tokens}")
    for part, phase in answer.phases.items():
        each = phase.seconds / max(1, phase.steps)
        yield Seen(f"{part}: {phase.seconds:.2f} s, {each:.3f} s a step")
    yield Seen(f"from start to end: {whole:.1f} s")
    plain = program.plaintext(answer)
    close = plain.first_difference(answer) is None or "(a close call)" in plain.verdict(answer)
    yield Seen(f"beside plaintext: {plain.verdict(answer)}", not close)


@of_model
def local(facts: Facts, name: str, root: Path, device: str, length: int) -> Iterator[Seen]:
    """A prompt and decode steps of three processes over inherited sockets."""
    from mergec.runtime.roles.local import run_local

    yield Seen(f"the model: {facts['what']}")
    ids = gpu_models.tokens(facts["vocabulary"], length)
    with Memory() as memory:
        found = run_local(
            root / name, ids, max_tokens=DECODED, device=device, ignore_stop=True, temperature=0.0
        )
    if found.setup is not None:
        yield Seen(f"setup: {found.setup.seconds:.2f} s")
    first, *later = found.records
    yield Seen(timed(name, f"first prompt of {length}", first.seconds))
    yield Seen(timed(name, "decode", min(report.seconds for report in later)))
    yield memory.seen()


class Service:
    """`mergec serve` or `mergec deal` on a free port of loopback."""

    def __init__(self, command: str, bundle: Path, *options: str) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `stop`)
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "mergec.runtime.cli", command, str(bundle), "--plaintext",
                "--listen", "127.0.0.1:0", *options,
            ],
            cwd=ROOT, stdout=self._said, stderr=self._said, text=True,
        )  # fmt: skip

    def lines(self) -> list[str]:
        self._said.seek(0)
        return self._said.read().splitlines()

    def address(self) -> str:
        """Where it listens. Raises RuntimeError, with its last line, if it does not."""
        until = time.monotonic() + START
        while time.monotonic() < until and self.process.poll() is None:
            for line in self.lines():
                with suppress(ValueError):
                    event = json.loads(line)
                    if event.get("event") == "listening":
                        return str(event["address"])
            time.sleep(0.05)
        raise RuntimeError((self.lines() or ["a service did not start"])[-1])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._said.close()


@of_model
def loopback(
    facts: Facts, name: str, root: Path, device: str, prompts: Sequence[int] = (64, 256)
) -> Iterator[Seen]:
    """Prompts and decode steps of a client with a server and a dealer, over TCP of loopback."""
    from mergec.runtime.roles.client import Connection
    from mergec.runtime.transport.address import Address
    from mergec.runtime.transport.connect import Security

    yield Seen(f"the model: {facts['what']}")
    ids = gpu_models.tokens(facts["vocabulary"], max(prompts))
    services, on = [], ("--device", device)
    try:
        services.append(Service("deal", root / name / "dealer", *on))
        dealer = services[0].address()
        services.append(
            Service("serve", root / name / "server", "--dealer", dealer, "--rate", "0", *on)
        )
        with (
            Memory() as memory,
            Connection(
                root / name / "client", server=Address.parse(services[1].address()),
                dealer=Address.parse(dealer), security=Security("client", None, plaintext=True),
                device=device, reuse=False,
            ) as connection,
        ):  # fmt: skip
            if connection.setup is not None:
                yield Seen(f"setup: {connection.setup.seconds:.2f} s")
            for length in prompts:
                yield from _asked(name, connection, ids[:length])
            yield memory.seen()
    finally:
        for service in services:
            service.stop()


def _asked(name: str, connection: Any, prompt: list[int]) -> Iterator[Seen]:
    """A prompt twice, as the first time loads kernels, and the steps after it."""
    first, decoded = [], []
    for _ in range(2):
        found = connection.generate(prompt, max_tokens=DECODED, stop=())
        reports = [report for token in found for report in token.reports]
        first.append(sum(report.seconds for report in reports if not report.past))
        decoded += [report.seconds for report in reports if report.past]
    what = f"prompt of {len(prompt)}"
    yield Seen(f"{timed(name, what, first[1])}, the first time {first[0]:.2f} s")
    yield Seen(f"after {len(prompt)} tokens, {timed(name, 'decode', min(decoded))}")


@of_model
def profiled_steps(
    facts: Facts, name: str, root: Path, device: str, prompts: Sequence[int] = (64, 256)
) -> Iterator[Seen]:
    """Prompts and a decode step after each in one process, and where their time goes."""
    from gpu_profile import profiled

    programs = loaded(name, root)
    yield Seen(f"the model: {facts['what']}")
    ids = gpu_models.tokens(facts["vocabulary"], max(prompts) + 8)
    with Session(programs, device) as running:
        for length in prompts:
            taken = [_taken(running, ids[:length], 0) for _ in range(2)]
            yield Seen(f"prompt of {length}: {taken[1]:.3f} s, the first time {taken[0]:.2f} s")
            taken = [_taken(running, ids[i : i + 1], length + i) for i in range(4)]
            yield Seen(f"decode after {length}: {min(taken):.3f} s")
        for length in prompts:
            yield from profiled(f"a prompt of {length}", partial(running.step, ids[:length], 0))
        yield from profiled("a decode step", partial(running.step, ids[:1], prompts[-1]))
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
        yield Seen(f"memory of all three roles on the device: {peak:.1f} GB")


def _taken(running: InProcessSession, ids: Sequence[int], past: int) -> float:
    began = time.perf_counter()
    running.step(ids, past)
    return time.perf_counter() - began


@of_model
def stock(facts: Facts, name: str, root: Path, device: str) -> Iterator[Seen]:
    """A prompt and two tokens by CrypTen's stock protocols."""
    from mergec.runtime.roles.local import run_local

    yield Seen(f"the model: {facts['what']}")
    began = time.perf_counter()
    prompt = gpu_models.tokens(facts["vocabulary"], 4)
    found = run_local(root / name, prompt, max_tokens=2, mode="crypten", device=device)
    for report in found.records:
        yield Seen(f"{report.phase}: {report.seconds:.2f} s")
    yield Seen(f"with start-up: {time.perf_counter() - began:.1f} s")
