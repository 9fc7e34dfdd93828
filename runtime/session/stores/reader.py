"""Reads a store, and uses up its answers.

An answer is entered in the journal, and the journal is flushed to disk, before any of its masks is
used: an answer that a crash interrupts is lost, never reused.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import torch

from mergec.runtime.core.errors import PartyError
from mergec.runtime.correlations.prg import derive
from mergec.runtime.session.stores.format import (
    CHUNK_BYTES,
    HEADER,
    JOURNAL,
    LENGTH,
    NUMBER,
    SEED,
    Header,
    StoreError,
    answer_file,
    read_file,
    read_header,
    unseal,
    used_answers,
)


class Store:
    """One party's part of a store."""

    def __init__(self, folder: Path, header: Header, key: bytes, seed: bytes) -> None:
        self.folder = folder
        self.header = header
        self._key = key
        self._open: Corrections | None = None
        self.seed = seed
        """Seed of what belongs to no answer: the static masks of weights."""

    @classmethod
    def open(cls, folder: Path, key: bytes) -> Store:
        """Read a store; raises StoreError if it is missing, damaged, or under another key."""
        data = read_file(folder, HEADER)
        header = read_header(folder, data)
        sealed = read_file(folder, SEED)
        own = derive(key, f"store {header.store} {header.role}")
        seed = unseal(own, 0, sealed, data, folder / SEED)
        return cls(folder, header, own, seed)

    def left(self) -> list[int]:
        """Unused answers, in order."""
        used = used_answers(self.folder)
        return [n for n in range(self.header.answers) if n not in used]

    def take(self, answer: int) -> tuple[bytes, Corrections]:
        """Use up an answer for good; returns its seed and the dealer's corrections.

        Closes the answer taken before. Raises StoreError if this one has been used before.
        """
        self.close()
        self._note(answer)
        self._open = Corrections(
            answer_file(self.folder, answer), derive(self._key, f"answer {answer}")
        )
        return derive(self.seed, f"answer {answer}"), self._open

    def close(self) -> None:
        """Close the answer that was taken."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _note(self, answer: int) -> None:
        """Enter an answer in the journal, and flush the journal to disk."""
        with (self.folder / JOURNAL).open("ab+") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            if not 0 <= answer < self.header.answers or answer in used_answers(self.folder):
                raise StoreError(f"{self.folder}: answer {answer} has been used or does not exist")
            try:
                # A crash may have left an incomplete entry; that answer was never started.
                os.truncate(journal.fileno(), self._whole() * NUMBER.size)
                journal.write(NUMBER.pack(answer))
                journal.flush()
                os.fsync(journal.fileno())
            except OSError as error:
                raise StoreError(
                    f"{self.folder}: cannot write the journal ({error.strerror}); free some space"
                ) from error

    def _whole(self) -> int:
        return (self.folder / JOURNAL).stat().st_size // NUMBER.size


class NoCorrections:
    """Stands for corrections in the setup of a session from a store, which has none."""

    def read(self, nbytes: int) -> torch.Tensor:
        raise PartyError("this program cannot run from a store; start a session with the dealer")


class Corrections:
    """Reads an answer's corrections from its file, which is unlinked as soon as it is open.

    So nothing stays on disk, however the answer ends.
    """

    def __init__(self, file: Path, key: bytes) -> None:
        self._path, self._key = file, key
        try:
            self._file = file.open("rb")
            file.unlink()
        except OSError as error:
            raise StoreError(f"{file}: cannot be read ({error.strerror})") from error
        self._chunk = np.empty(0, np.uint8)
        self._number = 0

    def read(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` bytes, as a new tensor."""
        result = np.empty(nbytes, np.uint8)
        done = 0
        while done < nbytes:
            if not len(self._chunk):
                self._chunk = np.frombuffer(self._next(), np.uint8)
            count = min(nbytes - done, len(self._chunk))
            result[done : done + count] = self._chunk[:count]
            self._chunk = self._chunk[count:]
            done += count
        return torch.from_numpy(result)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self) -> bytes:
        head = self._file.read(LENGTH.size)
        if len(head) < LENGTH.size:
            raise StoreError(
                f"{self._path}: is too short for this answer; run `mergec prepare` again"
            )
        (size,) = LENGTH.unpack(head)
        if size > 2 * CHUNK_BYTES:
            raise StoreError(f"{self._path}: is damaged; run `mergec prepare` again")
        chunk = unseal(self._key, self._number, self._file.read(size), b"", self._path)
        self._number += 1
        return chunk
