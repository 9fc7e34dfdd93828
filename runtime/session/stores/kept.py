"""Masked weights, W - B, that a client keeps from one session to the next.

The server derives the static masks B from its key, the client's name, and W itself, as integers. So
one B never hides two different W, and W - B is the same message in every session: it need not be
sent again. W - B is uniformly distributed, and alone it is not a secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergec.runtime.core.errors import MergecError
from mergec.runtime.core.memory import WordsFile
from mergec.runtime.correlations.prg import derive
from mergec.runtime.program.tensor_file import places

_DIGEST = "blake2b"


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of named tensors: it differs if a name, a type, a shape or a value does."""
    total = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).numpy().view(np.uint8).data)
    return total.hexdigest()


def mask_seed(key: bytes, program: str, client: str, weights: str) -> bytes:
    """Seed of the static masks for these weights (`digest_of` the words), and this client."""
    return derive(key, f"masks of {weights} in {program} for {client}")


def name_of(seed: bytes) -> str:
    """A name for the masks of a seed; it reveals nothing about them, as `derive` is one-way."""
    return derive(seed, "name of the masks").hex()


def is_name(text: object) -> bool:
    """Whether `text` is a valid name of masks, and so safe as part of a file's name."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


class Kept:
    """A client's masked weights of one program under one set of masks, in a file."""

    def __init__(self, root: Path, program: str, name: str) -> None:
        """`program`: its hash. `name`: name of the masks, from the server."""
        self._file = root / f"{program[:16]}-{name}.safetensors"

    def load(self) -> tuple[dict[str, torch.Tensor], WordsFile] | None:
        """The masked weights by name, and the file from which they are mapped, which the ranks of
        the client can share; None if they are missing or damaged."""
        try:
            with safe_open(self._file, framework="pt") as reader:  # checks it
                told = (reader.metadata() or {}).get(_DIGEST)
            mapped = WordsFile.open(self._file)
            tensors = {
                name: mapped.words(place.start, place.shape, place.dtype)
                for name, place in places(self._file).items()
            }
        except (SafetensorError, OSError, KeyError, ValueError):
            return None
        intact = told == digest_of(tensors)
        for tensor in tensors.values():
            mapped.release(tensor)  # the digest read all of them
        return (tensors, mapped) if intact else None

    def save(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep them; raises MergecError if they cannot be written."""
        unfinished = self._file.with_suffix(".unfinished")
        here = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_file(here, unfinished, {_DIGEST: digest_of(here)})
            unfinished.rename(self._file)
        except (SafetensorError, OSError) as error:
            with suppress(OSError):
                unfinished.unlink()
            raise MergecError(
                f"{self._file}: cannot be written ({error}); leave out --keep, or free some space"
            ) from error
