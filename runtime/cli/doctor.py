"""Checks a machine and, if given, a bundle, certificates and ports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mergec.runtime.core.errors import BundleError, MergecError
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER, Vis
from mergec.runtime.correlations.prg import Prg, new_seed
from mergec.runtime.program.bundle import TOKENIZER, load_bundle, read_manifest
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.session.sampling import Sampling, draw_for
from mergec.runtime.session.text import VOCABULARY, Text
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.certificates import check_certificate, find_folder

GOOD, POOR, BAD = "good", "poor", "bad"
"""Fine; usable, but slow or without something that not everybody needs; not usable."""

PYTHON, TORCH = (3, 11), ((2, 11), (2, 14))
_NEEDED = ("numpy", "numba", "safetensors", "cryptography", "tokenizers", "jinja2", "structlog")
_OPTIONAL = {
    "crypten": "--mode crypten",
    "transformers": "compiling models, and some generation settings",
}
_SAMPLE_BYTES, _SLOW_RATE = 32 << 20, 0.4e9


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    state: str
    said: str


def examine(
    bundle: Path | None = None, certificates: Path | None = None, listens: tuple[str, ...] = ()
) -> Iterator[Finding]:
    """Run all checks; yields their findings."""
    yield from _machine()
    for address in listens:
        yield _port(address)
    role = ""
    if bundle is not None:
        try:
            role = read_manifest(bundle).role
            yield from _bundle(bundle, role)
        except MergecError as error:
            yield Finding("bundle", BAD, str(error))
    if certificates is not None:
        yield _certificates(certificates, role)


def _machine() -> Iterator[Finding]:
    found = platform.python_version()
    state = GOOD if sys.version_info >= PYTHON else BAD
    yield Finding("Python", state, found if state == GOOD else f"{found}; install 3.11 or newer")
    yield _torch()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding("packages", BAD, f"missing: {', '.join(missing)}; pip install mergec")
    else:
        yield Finding("packages", GOOD, "all there")
        yield _kernels()
    for name, use in _OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield Finding(name, POOR, f"not installed; needed for {use} only")
    tls = GOOD if ssl.HAS_TLSv1_3 else BAD
    yield Finding("TLS 1.3", tls, ssl.OPENSSL_VERSION)
    yield _aes()
    yield Finding("cores", GOOD, f"{len(os.sched_getaffinity(0))}")
    yield Finding("memory", GOOD, f"{_size(_available())} free")


def _torch() -> Finding:
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", BAD, "not installed; pip install 'torch>=2.11,<2.14'")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if TORCH[0] <= numbers < TORCH[1]:
        return Finding("torch", GOOD, found)
    return Finding("torch", BAD, f"{found}; install one of 2.11 to 2.13")


def _aes() -> Finding:
    """All randomness is AES in counter mode: slow without processor instructions for it."""
    prg, began = Prg(new_seed()), time.perf_counter()
    prg.read(_SAMPLE_BYTES)
    rate = _SAMPLE_BYTES / (time.perf_counter() - began)
    flags = _processor_flags()
    named = [flag for flag in ("aes", "vaes") if flag in flags]
    said = f"{rate / 1e9:.1f} GB/s, instructions: {' '.join(named) or 'none found'}"
    return Finding("AES", GOOD if rate > _SLOW_RATE else POOR, said)


def _kernels() -> Finding:
    from mergec.runtime.kernels.compiled import can_keep  # numba may be what is missing

    if can_keep():
        return Finding("kernels", GOOD, "compiled once")
    told = "compiled again at each start; set NUMBA_CACHE_DIR to a folder that this user may write"
    return Finding("kernels", POOR, told)


def _processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].split()) if lines else set()


def _port(text: str) -> Finding:
    what = f"port {text}"
    try:
        address = Address.parse(text)
        socket.create_server((address.host, address.port)).close()
    except MergecError as error:
        return Finding(what, BAD, str(error))
    except (OSError, OverflowError) as error:
        return Finding(what, BAD, f"cannot listen there ({error}); choose another")
    return Finding(what, GOOD, "free")


def _bundle(folder: Path, role: str) -> Iterator[Finding]:
    program = load_bundle(folder, role)
    manifest = program.manifest
    yield Finding(
        "bundle",
        GOOD,
        f"{manifest.model or 'program'} for the {role}, {len(program.instructions)} "
        f"instructions, {manifest.fractional_bits} fractional bits, program "
        f"{manifest.program_hash[:12]}",
    )
    needed, free = _memory(program, role), _available()
    said = f"about {_size(needed)} for the first session, {_size(free)} free"
    yield Finding("memory for it", GOOD if needed < free else BAD, said)
    if role == ROLES[CLIENT]:
        yield _tokenizer(folder / TOKENIZER)
        if manifest.generation:
            yield _settings(manifest)


def _memory(program: RoleProgram, role: str) -> int:
    """Bytes of a session's weights: W - B at the client, B at the dealer, W at the server."""
    count = sum(math.prod(c.shape) for c in program.constants if c.vis in (Vis.SERVER, Vis.SHARED))
    held = sum(tensor.numel() * tensor.element_size() for tensor in program.tensors.values())
    each = {ROLES[CLIENT]: 8, ROLES[DEALER]: 8, ROLES[SERVER]: 4}[role]
    return each * count + held


def _settings(manifest: Manifest) -> Finding:
    try:
        draw_for(Sampling(), manifest)
    except MergecError as error:
        return Finding("generation settings", BAD, str(error))
    return Finding("generation settings", GOOD, ", ".join(manifest.generation.to_dict()))


def _tokenizer(folder: Path) -> Finding:
    if not (folder / VOCABULARY).is_file():
        return Finding("tokenizer", POOR, "none: prompts are token numbers (--ids)")
    try:
        text = Text.load(folder)
    except BundleError as error:
        return Finding("tokenizer", BAD, str(error))
    return Finding("tokenizer", GOOD, "with a chat template" if text.has_chat else "no chat")


def _certificates(folder: Path, role: str) -> Finding:
    """Check the certificates of the bundle's role; without a bundle, of any role."""
    candidates = [role] if role else list(ROLES)
    reason = ""
    for candidate in candidates:
        try:
            warning = check_certificate(find_folder(folder, candidate), candidate)
        except MergecError as error:
            reason = reason or str(error)
            continue
        return Finding("certificates", POOR if warning else GOOD, warning or f"of the {candidate}")
    return Finding("certificates", BAD, reason)


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return found["MemAvailable"] * 1024
    except (OSError, KeyError, IndexError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
