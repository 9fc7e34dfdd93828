"""Blocks of a stream on disk, encrypted, until they are used or thrown away."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mergec.runtime.core.errors import MergecError

SEGMENT_BYTES = 64 << 20
"""Bytes of a file; its space is free again once none of its blocks is left."""

_NONCE_BYTES = 12
_TAG_BYTES = 16


class _Segment:
    """A file of some blocks. left: how many are neither read nor dropped."""

    def __init__(self) -> None:
        descriptor, path = tempfile.mkstemp(prefix="mergec-")
        self.file = os.fdopen(descriptor, "rb+", buffering=0)
        Path(path).unlink()
        self.end = self.left = 0


@dataclass(frozen=True, eq=False)
class Spooled:
    """A block in a spool. nbytes: of the block itself."""

    segment: _Segment
    start: int
    number: int
    nbytes: int


class Spool:
    """Holds blocks in files without names, in the folder that TMPDIR names.

    They are encrypted with AES-256-GCM under a key that is drawn here and never leaves memory. So
    nobody can read them once the process has ended, and nothing is left of them in the folder.
    """

    def __init__(self) -> None:
        self.size = 0
        """Bytes of the blocks that are held."""
        self._cipher = AESGCM(AESGCM.generate_key(256))
        self._number = 0
        self._last: _Segment | None = None

    def put(self, block: np.ndarray) -> Spooled:
        """Hold a block of bytes; raises OSError if it cannot be written."""
        number, self._number = self._number, self._number + 1
        sealed = self._cipher.encrypt(number.to_bytes(_NONCE_BYTES, "big"), block.data, None)
        segment = self._last
        if segment is None or segment.end >= SEGMENT_BYTES:
            segment = _Segment()
            self._leave(self._last)
            self._last = segment
        rest, start = memoryview(sealed), segment.end
        while rest:
            rest = rest[os.pwrite(segment.file.fileno(), rest, start + len(sealed) - len(rest)) :]
        segment.end += len(sealed)
        segment.left += 1
        self.size += block.nbytes
        return Spooled(segment, start, number, block.nbytes)

    def take(self, held: Spooled) -> np.ndarray:
        """A block that is held, which is dropped; raises MergecError if it is damaged."""
        descriptor = held.segment.file.fileno()
        try:
            sealed = os.pread(descriptor, held.nbytes + _TAG_BYTES, held.start)
            data = self._cipher.decrypt(held.number.to_bytes(_NONCE_BYTES, "big"), sealed, None)
        except (OSError, InvalidTag) as error:
            raise MergecError(
                "randomness that was dealt ahead cannot be read back from the temporary folder; "
                "start another session, and check the disk"
            ) from error
        self.drop(held)
        return np.frombuffer(bytearray(data), np.uint8)

    def drop(self, held: Spooled) -> None:
        """Forget a block that is held."""
        self.size -= held.nbytes
        held.segment.left -= 1
        if held.segment is not self._last or not held.segment.left:
            self._leave(held.segment)

    def _leave(self, segment: _Segment | None) -> None:
        """Close a file that has no block left and gets none."""
        if segment is not None and not segment.left:
            segment.file.close()
            if segment is self._last:
                self._last = None
