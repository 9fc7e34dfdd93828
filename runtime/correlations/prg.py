"""Pseudo-random generator: AES-256 in counter mode, never torch's generator."""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SEED_BYTES = 32
_CHUNK = 1 << 20
_ZEROS = memoryview(bytes(_CHUNK))
_BLOCK = 16


def new_seed() -> bytes:
    """A fresh 256-bit seed from the operating system."""
    return secrets.token_bytes(SEED_BYTES)


def derive(seed: bytes, purpose: str) -> bytes:
    """An independent seed for another purpose: BLAKE2b keyed by the parent seed."""
    return hashlib.blake2b(purpose.encode(), key=seed, digest_size=SEED_BYTES).digest()


class Prg:
    """The key stream of one seed, read once from the start: no word is ever given twice.

    Two parties that hold the seed and make the same calls get the same words. The counter block
    starts at zero, which is sound as each key is used for one stream only (`derive`).
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes, this one {len(seed)}")
        self._stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(_BLOCK))).encryptor()

    def read(self, nbytes: int) -> np.ndarray:
        """The next `nbytes` bytes of the stream, as a fresh uint8 array."""
        # update_into wants room for one more cipher block than it writes.
        buffer = np.empty(nbytes + _BLOCK, np.uint8)
        view = buffer.data
        for start in range(0, nbytes, _CHUNK):
            size = min(_CHUNK, nbytes - start)
            self._stream.update_into(_ZEROS[:size], view[start : start + size + _BLOCK])
        return buffer[:nbytes]
