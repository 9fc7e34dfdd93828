"""Traces that a secret would leave in a network capture, and the search for them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mergec.runtime.core.spec import Vis
from mergec.runtime.engine.weights import take_weights
from mergec.runtime.program.bundle import load_bundle

SHOWN = 4
"""Numbers of a weight's row that count as a trace of it."""

SHORTEST = 8
"""Shortest trace in bytes; shorter ones would occur by chance."""

_CHUNK = 1 << 26
_SIEVE_BITS = 24
_SIEVED = np.uint64((1 << _SIEVE_BITS) - 1)


def text_traces(text: str, ids: list[int]) -> dict[str, bytes]:
    """The forms in which a text, or its tokens, could appear on the wire."""
    found = {"text": text.encode()}
    if len(ids) > 1:  # a single number would occur by chance
        found["token numbers as text"] = str(ids)[1:-1].encode()
        sizes = (8, 4, 2) if max(ids) < 1 << 16 else (8, 4)
        for kind in (f"{order}u{size}" for size in sizes for order in "<>"):
            found[f"token numbers as {kind}"] = np.array(ids, dtype=kind).tobytes()
    return {what: trace for what, trace in found.items() if len(trace) >= SHORTEST}


def weight_traces(bundle: Path) -> set[bytes]:
    """The first numbers of every row of every weight, as floats and as fixed-point words.

    Rows that begin with four equal numbers, such as ones, are left out: they would occur by chance.
    """
    program = load_bundle(bundle, "server")
    numbers = [*program.tensors.items(), *take_weights(program).items()]
    public = {spec.name for spec in program.constants if spec.vis is Vis.PUBLIC}
    found: set[bytes] = set()
    for name, tensor in numbers:
        if name in public or tensor.dim() == 0 or tensor.shape[-1] < SHOWN:
            continue
        rows = tensor.reshape(-1, tensor.shape[-1])[:, :SHOWN]
        rows = rows[(rows != rows[:, :1]).any(1)].contiguous()
        wide = rows.numpy() if rows.is_floating_point() else rows.to(torch.int64).numpy()
        found.update(row.tobytes() for row in wide)
    return found


def search(file: Path, texts: dict[str, bytes], rows: set[bytes]) -> Iterator[str]:
    """Which of the traces occur in a file, at any offset."""
    if not file.stat().st_size:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as kept:
        yield from (
            f"{file.name}: {what}" for what, trace in texts.items() if kept.find(trace) >= 0
        )
        begins = np.array([int.from_bytes(row[:8], "little") for row in rows], dtype=np.uint64)
        sieve = np.zeros(1 << _SIEVE_BITS, dtype=bool)
        sieve[begins & _SIEVED] = True
        longest = max(map(len, rows), default=0)
        for start in range(0, len(kept), _CHUNK):
            part = kept[start : start + _CHUNK + longest]
            for at in _candidates(part, begins, sieve):
                if any(part[at : at + SHOWN * size] in rows for size in (4, 8)):
                    yield f"{file.name}: a weight's row at byte {start + at}"


def _candidates(part: bytes, begins: np.ndarray, sieve: np.ndarray) -> Iterator[int]:
    """Offsets of the given 8-byte words; the sieve skips nearly all others."""
    for offset in range(min(8, len(part) - 7)):
        words = np.frombuffer(part, "<u8", (len(part) - offset) // 8, offset)
        places = np.flatnonzero(sieve[words & _SIEVED])
        found = places[np.isin(words[places], begins)]
        yield from (offset + 8 * int(place) for place in found)
