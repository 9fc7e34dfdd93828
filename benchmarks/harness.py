"""Runs programs in three processes from given inputs, and collects what each step took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER, Vis
from mergec.runtime.core.values import encode
from mergec.runtime.correlations.prg import Prg, new_seed
from mergec.runtime.program.bundle import save_bundle
from mergec.runtime.program.program import PROMPT, InputSpec, RoleProgram
from mergec.runtime.transport.lines import Lines

ROLE = Path(__file__).with_name("role.py")
PARTIES = CLIENT, SERVER
TIMEOUT = 1200.0
"""Seconds that all steps of one run may take together."""

_POLL = 0.05

_GRACE = 2.0
"""Seconds for the other roles to fail after one did: any of them may report the cause."""


@dataclass(frozen=True)
class Step:
    """Inputs of one step by name, in the clear, and how often to run it; the median counts.

    phase: the part of the program to run, if it has parts. ahead: number of additional runs that
    begin when all of the dealer's randomness is available. whole: whether a program that resends
    its hidden state then runs its last phase, too, which turns hidden states to logits.
    """

    inputs: dict[str, torch.Tensor]
    repeats: int = 1
    phase: str = PROMPT
    ahead: int = 0
    whole: bool = True


@dataclass(frozen=True)
class Share:
    """What an instruction took of a step: processor seconds of both parties, and bytes."""

    seconds: float = 0.0
    online: float = 0
    offline: float = 0

    def __add__(self, other: Share) -> Share:
        return Share(
            self.seconds + other.seconds,
            self.online + other.online,
            self.offline + other.offline,
        )


@dataclass(frozen=True)
class Taken:
    """Measurements of one step. peak: larger resident set of client and server so far, in bytes.

    seconds: while the dealer works on the same cores. online_seconds: with the dealer's randomness
    available in advance, if that was run. offline_seconds: the dealer's processor time, if it runs
    as a process of its own. value: what the client learns; None if nothing. shares: by instruction,
    if that was asked for. processor_seconds: those of all roles together.
    """

    seconds: float
    online_seconds: float | None
    offline_seconds: float | None
    rounds: int
    online: int
    offline: int
    peak: int
    value: torch.Tensor | None
    shares: Mapping[str, Share] = field(default_factory=dict)
    processor_seconds: float = 0.0


class RunError(Exception):
    """A run that failed: the measurements up to that step, and why."""

    def __init__(self, reason: str, taken: list[Taken]) -> None:
        # Both are arguments, so that the error can go from one process to another.
        super().__init__(reason, taken)
        self.taken = taken

    def __str__(self) -> str:
        return str(self.args[0])


def run(
    programs: Mapping[str, RoleProgram],
    steps: Sequence[Step],
    mode: str,
    network: str = "",
    split: bool = False,
) -> list[Taken]:
    """Run the steps one after another in three connected processes.

    network: profile to emulate on the links between the roles, if any (`network`). split: whether
    to note what each instruction takes. Raises RunError if a step fails.
    """
    with tempfile.TemporaryDirectory(prefix="mergec-bench-") as name:
        folder = Path(name)
        for role in ROLES:
            # Inputs are token numbers, and no tokenizer is saved.
            manifest = replace(programs[role].manifest, tokenizer="")
            save_bundle(replace(programs[role], manifest=manifest), folder / role)
        for index, step in enumerate(steps):
            specs = programs[ROLES[CLIENT]].phase(step.phase).inputs
            for repeat in range(step.repeats + step.ahead):
                _write_inputs(folder, f"{index}-{repeat}", step, specs)
        job = {
            "bundle": name,
            "folder": name,
            "mode": mode,
            "network": network,
            "split": split,
            "steps": [
                {
                    "repeats": step.repeats,
                    "phase": step.phase,
                    "ahead": step.ahead,
                    "whole": step.whole,
                }
                for step in steps
            ],
        }
        (folder / "job.json").write_text(json.dumps(job))
        with Lines() as lines:
            parties = {role: _start(folder, role, lines.of(role)) for role in ROLES}
        try:
            failure = _wait(parties, folder)
        finally:
            for party in parties.values():
                party.kill()
                party.wait()
        events = {role: _events(folder / f"{role}.out") for role in ROLES}
        done = min(len(events[ROLES[party]]) for party in PARTIES)
        taken = [_taken(events, index, folder) for index in range(done)]
        if failure or done < len(steps):
            raise RunError(failure or "a role ended before the last step", taken)
        return taken


def _taken(events: Mapping[str, list[dict[str, Any]]], index: int, folder: Path) -> Taken:
    client, server = (events[ROLES[party]][index] for party in PARTIES)
    ahead = [party["online_seconds"] for party in (client, server)]
    dealt = events[ROLES[DEALER]]
    value = folder / f"{index}.out"
    return Taken(
        seconds=max(client["seconds"], server["seconds"]),
        online_seconds=None if None in ahead else max(ahead),
        offline_seconds=dealt[index]["processor_seconds"] if index < len(dealt) else None,
        rounds=client["rounds"],
        online=client["online"],
        offline=client["offline"] + server["offline"],
        peak=max(client["peak"], server["peak"]),
        value=load_file(value)["value"] if value.exists() else None,
        shares=_shares(client.get("shares", {}), server.get("shares", {})),
        processor_seconds=sum(
            of[index]["processor_seconds"] for of in events.values() if index < len(of)
        ),
    )


def _shares(client: Mapping[str, Any], server: Mapping[str, Any]) -> dict[str, Share]:
    """Both parties' work and dealt bytes; what is online both of them count."""
    found = {}
    for name in {**client, **server}:
        own, other = (Share(*of.get(name, ())) for of in (client, server))
        found[name] = Share(own.seconds + other.seconds, own.online, own.offline + other.offline)
    return found


def _write_inputs(folder: Path, name: str, step: Step, specs: Sequence[InputSpec]) -> None:
    """Write each role's view: opened values or shares, and shares of fresh masks."""
    views: dict[str, dict[str, torch.Tensor]] = {role: {} for role in ROLES}
    for spec in specs:
        for role, (opened, mask) in zip(ROLES, _seen(spec, step.inputs[spec.name]), strict=True):
            views[role] |= {f"{spec.name}.opened": opened, f"{spec.name}.mask": mask}
    for role, tensors in views.items():
        contiguous = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        save_file(contiguous, folder / f"{name}-{role}.safetensors")


def _seen(spec: InputSpec, value: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What client, server and dealer hold of an input: a value and a mask, zeros if nothing."""
    nothing = torch.zeros_like(value, dtype=torch.int64)
    if spec.vis is Vis.CLIENT:
        return [(value, nothing), (nothing, nothing), (nothing, nothing)]
    words, client, server = encode(value.double(), spec.frac), *map(_uniform, [value.shape] * 2)
    if spec.form == "share":
        return [(client, nothing), (words - client, nothing), (nothing, nothing)]
    if spec.form == "sent":
        return [(nothing, client), (words - client, nothing), (nothing, client)]
    opened = words + client + server
    return [(opened, client), (opened, server), (nothing, client + server)]


def _uniform(shape: torch.Size) -> torch.Tensor:
    words = Prg(new_seed()).read(8 * shape.numel()).view(np.int64)
    return torch.from_numpy(words).reshape(shape).clone()


def _start(folder: Path, role: str, lines: Sequence[int]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, str(ROLE), str(folder / "job.json"), role, *map(str, lines)]
    with (folder / f"{role}.out").open("wb") as out, (folder / f"{role}.err").open("wb") as err:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err, pass_fds=lines)


def _wait(parties: Mapping[str, subprocess.Popen[bytes]], folder: Path) -> str:
    """Wait until all roles end or one fails; returns why, or an empty string."""
    deadline = time.monotonic() + TIMEOUT
    while any(party.poll() is None for party in parties.values()):
        if any(party.returncode for party in parties.values()):
            time.sleep(_GRACE)
            break
        if time.monotonic() > deadline:
            return f"not done after {TIMEOUT:g} s"
        time.sleep(_POLL)
    return "; ".join(
        f"the {role} ended with code {party.returncode}: {_last_words(folder, role)}"
        for role, party in parties.items()
        if party.poll()
    )


def _last_words(folder: Path, role: str) -> str:
    lines = (folder / f"{role}.err").read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def _events(output: Path) -> list[dict[str, Any]]:
    """The steps that a role reported; the last line may have been cut off."""
    lines = output.read_text().splitlines(keepends=True)
    said = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in said if event["event"] == "step"]
