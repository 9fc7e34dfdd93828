"""The key file of a store: a key for the answers that are left, and none for those that were used.

Answer i is encrypted under a key that is derived from K_i, as is K_{i+1}. K_0 is random, and the
file holds the current K_i only, encrypted under the party's key of the store. Derivation is
one-way, so once the file holds K_{i+1}, nobody who has the store, its key file and the party's key
can decrypt answers up to i.

The file has two slots of a block each. K_{i+1} is written to the slot that K_i is not in, and
flushed to disk; then the slot of K_i is overwritten with zeros, and that is flushed. So a crash at
any moment leaves at least one of them, and file systems that write in place keep no copy of K_i.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidTag

from mergec.runtime.correlations.prg import SEED_BYTES, derive
from mergec.runtime.session.stores.format import KEYS, NUMBER, StoreError, read_file, seal, unsealed

SLOT_BYTES = 4096
"""A slot fills blocks of the disk alone, so that it is overwritten alone."""

_SEALED_BYTES = SEED_BYTES + 16


class AnswerKey(NamedTuple):
    """K_i, for i = `answer` and what follows."""

    answer: int
    secret: bytes

    @property
    def own(self) -> bytes:
        """The key that the answer's file is encrypted under."""
        return derive(self.secret, "answer")

    @property
    def following(self) -> AnswerKey:
        return AnswerKey(self.answer + 1, derive(self.secret, "next"))


class KeyFile:
    """A party's key file. Writers hold the lock of the folder."""

    def __init__(self, folder: Path, key: bytes, context: bytes) -> None:
        """key: that of the party's part of the store. context: the header's file."""
        self._folder, self._file = folder, folder / KEYS
        self._key, self._context = derive(key, "answers"), context

    def first(self, secret: bytes) -> bytes:
        """The contents of the file of a new store whose K_0 is `secret`."""
        return self._slot(AnswerKey(0, secret)) + bytes(SLOT_BYTES)

    def read(self) -> AnswerKey:
        """The current key; raises StoreError if there is none."""
        found = [key for key in map(self._found, self._slots()) if key is not None]
        if not found:
            raise StoreError(f"{self._file}: is damaged, or encrypted under another key")
        return max(found)

    def advance(self, current: AnswerKey) -> AnswerKey:
        """Replace the current key by the following one, for good. Raises OSError if it cannot."""
        following = current.following
        with self._file.open("rb+", buffering=0) as file:
            self._write(file.fileno(), following.answer, self._slot(following))
            self._write(file.fileno(), current.answer, bytes(SLOT_BYTES))
        return following

    def clear(self, current: AnswerKey) -> None:
        """Erase the key before the current one, if a crash has left it. Raises OSError."""
        if any(self._slots()[(current.answer + 1) % 2]):
            with self._file.open("rb+", buffering=0) as file:
                self._write(file.fileno(), current.answer + 1, bytes(SLOT_BYTES))

    def _slots(self) -> tuple[bytes, bytes]:
        data = read_file(self._folder, KEYS)
        return data[:SLOT_BYTES], data[SLOT_BYTES:]

    @staticmethod
    def _write(descriptor: int, answer: int, slot: bytes) -> None:
        os.pwrite(descriptor, slot, answer % 2 * SLOT_BYTES)
        os.fsync(descriptor)

    def _slot(self, key: AnswerKey) -> bytes:
        # One number has one key, so the nonce never encrypts two texts.
        sealed = seal(self._key, key.answer, key.secret, self._context)
        return (NUMBER.pack(key.answer) + sealed).ljust(SLOT_BYTES, b"\0")

    def _found(self, slot: bytes) -> AnswerKey | None:
        if len(slot) != SLOT_BYTES:
            return None
        (answer,) = NUMBER.unpack_from(slot)
        sealed = slot[NUMBER.size : NUMBER.size + _SEALED_BYTES]
        try:
            return AnswerKey(answer, unsealed(self._key, answer, sealed, self._context))
        except InvalidTag:
            return None
