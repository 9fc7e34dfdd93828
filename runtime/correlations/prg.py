"""Pseudorandom generator: AES-256 in counter mode; torch's generator is never used."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SEED_BYTES = 32
_CHUNK = 1 << 20
_ZEROS = memoryview(bytes(_CHUNK))
_BLOCK = 16
_WORD = 8
_AHEAD = 1 << 16
"""Bytes generated at once to serve reads of up to this size."""


def new_seed() -> bytes:
    """A fresh 256-bit seed from the operating system."""
    return secrets.token_bytes(SEED_BYTES)


def derive(seed: bytes, purpose: str) -> bytes:
    """An independent seed for the purpose named: BLAKE2b keyed by the parent seed."""
    return hashlib.blake2b(purpose.encode(), key=seed, digest_size=SEED_BYTES).digest()


class Prg:
    """The key stream of one seed, read once from the start; no word is returned twice.

    Two parties that hold the seed and make the same calls get the same words. The counter block
    starts at zero, which is sound because each key is used for only one stream (`derive`). Raises
    ValueError if the seed does not have 32 bytes.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed must have {SEED_BYTES} bytes, not {len(seed)}")
        self._stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(_BLOCK))).encryptor()
        self._ahead = np.empty(0, np.uint8)
        self._used = 0

    def read(self, nbytes: int) -> np.ndarray:
        """The next `nbytes` bytes of the stream, as a uint8 array that nothing else refers to."""
        # Most reads are small. They share cipher calls, and are adjacent slices of one buffer.
        start, stop = self._used, self._used + nbytes
        if stop <= len(self._ahead):
            self._used = stop
            result = self._ahead[start:stop]
            return result.copy() if start % _WORD else result
        self._ahead, self._used = self._made(self._ahead[start:], max(nbytes, _AHEAD)), nbytes
        return self._ahead[:nbytes]

    def words(self, shape: Sequence[int], kind: np.dtype[Any]) -> np.ndarray:
        """The next words of this type, in this shape; nothing else refers to them."""
        return np.ndarray(tuple(shape), kind, self.read(math.prod(shape) * kind.itemsize).data)

    def _made(self, first: np.ndarray, nbytes: int) -> np.ndarray:
        """`nbytes` bytes of the stream, the first of which, `first`, were generated before."""
        # update_into needs room for one cipher block more than it writes.
        buffer = np.empty(nbytes + _BLOCK, np.uint8)
        buffer[: len(first)] = first
        view = buffer.data
        for start in range(len(first), nbytes, _CHUNK):
            size = min(_CHUNK, nbytes - start)
            self._stream.update_into(_ZEROS[:size], view[start : start + size + _BLOCK])
        return buffer[:nbytes]
