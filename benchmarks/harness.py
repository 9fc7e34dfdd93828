"""Runs programs in three processes from given inputs, and gathers what each step took."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from runtime.bundle import save_bundle
from runtime.correlations.prg import Prg, new_seed
from runtime.program import RoleProgram
from runtime.spec import CLIENT, DEALER, ROLES, SERVER, Vis
from runtime.values import encode

ROLE = Path(__file__).with_name("role.py")
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Step:
    """Inputs of one step by name, in the clear, and how often to run it: the median counts."""

    inputs: dict[str, torch.Tensor]
    repeats: int = 1


@dataclass(frozen=True)
class Taken:
    """What one step took. peak: the larger of client's and server's resident set so far."""

    seconds: float
    rounds: int
    online: int
    offline: int
    peak: int
    value: torch.Tensor


def run(
    programs: Mapping[str, RoleProgram], steps: Sequence[Step], mode: str, network: str = ""
) -> list[Taken]:
    """Run the steps one after the other in three processes on loopback.

    network: profile that the link between client and server is slowed down to, if any (`network`).
    """
    with tempfile.TemporaryDirectory(prefix="mergec-bench-") as name:
        folder = Path(name)
        for role in ROLES:
            save_bundle(programs[role], folder / role)
        specs = programs[ROLES[CLIENT]].inputs
        for index, step in enumerate(steps):
            for repeat in range(step.repeats):
                _write_inputs(folder, f"{index}-{repeat}", step, specs)
        job = {
            "bundle": name,
            "folder": name,
            "mode": mode,
            "network": network,
            "rendezvous": f"tcp://127.0.0.1:{_free_port()}",
            "steps": [{"repeats": step.repeats} for step in steps],
        }
        (folder / "job.json").write_text(json.dumps(job))
        parties = {role: _start(folder / "job.json", role) for role in ROLES}
        try:
            events = {role: _events(party, role) for role, party in parties.items()}
        finally:
            for party in parties.values():
                party.kill()
        return [_taken(events, index, folder) for index in range(len(steps))]


def _taken(events: Mapping[str, list[dict[str, Any]]], index: int, folder: Path) -> Taken:
    client, server = (events[ROLES[party]][index] for party in (CLIENT, SERVER))
    return Taken(
        seconds=max(client["seconds"], server["seconds"]),
        rounds=client["rounds"],
        online=client["online"],
        offline=client["offline"] + server["offline"],
        peak=max(client["peak"], server["peak"]),
        value=load_file(folder / f"{index}.out")["value"],
    )


def _write_inputs(folder: Path, name: str, step: Step, specs: Sequence[Any]) -> None:
    """Each role's view: opened values, and shares of fresh masks; the dealer's are the masks."""
    views: dict[str, dict[str, torch.Tensor]] = {role: {} for role in ROLES}
    for spec in specs:
        value = step.inputs[spec.name]
        if spec.vis is Vis.CLIENT:
            for role in ROLES:
                known = value if role == ROLES[CLIENT] else torch.zeros_like(value)
                views[role] |= {f"{spec.name}.opened": known, f"{spec.name}.mask": known[..., :0]}
            continue
        shares = [_uniform(value.shape) for _ in range(2)]
        opened = encode(value.double(), spec.frac) + shares[CLIENT] + shares[SERVER]
        masks = {CLIENT: shares[CLIENT], SERVER: shares[SERVER], DEALER: shares[0] + shares[1]}
        for party, mask in masks.items():
            role = ROLES[party]
            seen = torch.zeros_like(opened) if party == DEALER else opened
            views[role] |= {f"{spec.name}.opened": seen, f"{spec.name}.mask": mask}
    for role, tensors in views.items():
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, folder / f"{name}-{role}.safetensors")


def _uniform(shape: torch.Size) -> torch.Tensor:
    raw = torch.from_numpy(Prg(new_seed()).read(8 * shape.numel()))
    return raw.view(torch.int64).reshape(shape).clone()


def _start(job: Path, role: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, str(ROLE), str(job), role]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _events(party: subprocess.Popen[str], role: str) -> list[dict[str, Any]]:
    output, _ = party.communicate(timeout=TIMEOUT)
    if party.returncode:
        raise SystemExit(f"the {role} ended with code {party.returncode}; see its message above")
    return [event for line in output.splitlines() if (event := json.loads(line))["event"] == "step"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
