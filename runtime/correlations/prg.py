"""Pseudorandom generator: AES-256 in counter mode; torch's generator is never used."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from mergec.runtime.kernels import bitsliced, planes
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.transfers import to_device

NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.int16: np.dtype(np.int16),
    torch.int8: np.dtype(np.int8),
    torch.uint8: np.dtype(np.uint8),
}
"""Word types that are masked, dealt and sent."""

SEED_BYTES = 32
_CHUNK = 1 << 20
_ZEROS = memoryview(bytes(_CHUNK))
_BYTE = NUMPY[torch.uint8]
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
        self._ahead = np.empty(0, np.uint8).data
        self._used = 0

    def read(self, nbytes: int) -> np.ndarray:
        """The next `nbytes` bytes of the stream, as a uint8 array that nothing else refers to."""
        return self.words((nbytes,), _BYTE)

    def words(self, shape: Sequence[int], kind: np.dtype[Any]) -> np.ndarray:
        """The next words of this type, in this shape; nothing else refers to them."""
        # Most reads are small. They share cipher calls, and are adjacent parts of one buffer.
        start = self._used
        stop = start + math.prod(shape) * kind.itemsize
        if stop > len(self._ahead):
            size = stop - start
            self._ahead = self._made(self._ahead[start:], max(size, _AHEAD))
            start, stop = 0, size
        self._used = stop
        found = np.ndarray(shape, kind, self._ahead, start)
        return found.copy() if start % _WORD else found

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """`words` as a tensor."""
        return torch.from_numpy(self.words(shape, NUMPY[dtype]))

    def _made(self, first: memoryview, nbytes: int) -> memoryview:
        """`nbytes` bytes of the stream, the first of which, `first`, were generated before."""
        # update_into needs room for one cipher block more than it writes.
        view = np.empty(nbytes + _BLOCK, np.uint8).data
        view[: len(first)] = first
        for start in range(len(first), nbytes, _CHUNK):
            size = min(_CHUNK, nbytes - start)
            self._stream.update_into(_ZEROS[:size], view[start : start + size + _BLOCK])
        return view[:nbytes]


_PAIR = 2 * _BLOCK
_DEVICE_AHEAD = 1 << 20
"""Bytes that a device generates at once, where fewer are read."""


class DevicePrg:
    """The same key stream as that of `Prg`, generated on a device and left there."""

    def __init__(self, seed: bytes, device: torch.device) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed must have {SEED_BYTES} bytes, not {len(seed)}")
        keys = torch.from_numpy(bitsliced.expand_key(seed).view(np.int32))
        self._keys = to_device(keys, device, "input")
        self._blocks = 0
        self._ahead = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0

    def read(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` bytes of the stream, uint8, that nothing else refers to."""
        start, stop = self._used, self._used + nbytes
        if stop <= len(self._ahead):
            self._used = stop
            result = self._ahead[start:stop]
            return result.clone() if start % _WORD else result
        left = self._ahead[start:]
        pairs = -(-(max(nbytes, _DEVICE_AHEAD) - len(left)) // _PAIR)
        made = _STREAM(self._keys, self._blocks, pairs)
        self._blocks += 2 * pairs
        self._ahead, self._used = torch.cat([left, made]) if len(left) else made, nbytes
        return self._ahead[:nbytes]

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next words of this type, in this shape; nothing else refers to them."""
        return self.read(math.prod(shape) * dtype.itemsize).view(dtype).reshape(tuple(shape))


Stream = Prg | DevicePrg


def stream(seed: bytes, device: torch.device) -> Stream:
    """The key stream of a seed where its words are used."""
    return Prg(seed) if device.type == "cpu" else DevicePrg(seed, device)


def _stream_blocks(keys: torch.Tensor, start: int, pairs: int) -> torch.Tensor:
    """By `bitsliced` on the CPU, where `Prg` is what roles use."""
    blocks = np.zeros((2 * pairs, 2), np.uint64)
    blocks[:, 1] = np.arange(start, start + 2 * pairs, dtype=np.uint64).byteswap()
    made = bitsliced.encrypt(keys.numpy().view(np.uint32), blocks.view(np.uint32))
    return torch.from_numpy(np.ascontiguousarray(made).view(np.uint8).reshape(-1))


_STREAM = Kernel("cipher.stream", _stream_blocks, planes.stream)
