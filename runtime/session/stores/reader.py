"""Reads a store, and uses up its answers.

An answer is entered in the journal, and its key is erased from the disk, before any of its masks is
used: an answer that a crash interrupts is lost, never reused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH
from pathlib import Path

import numpy as np
import torch

from mergec.runtime.core.errors import PartyError
from mergec.runtime.correlations.prg import derive
from mergec.runtime.session.stores.folder import locked
from mergec.runtime.session.stores.format import (
    CHUNK_BYTES,
    HEADER,
    JOURNAL,
    LENGTH,
    STATIC,
    Header,
    StoreError,
    answer_file,
    read_file,
    read_header,
    sync_folder,
    unseal,
)
from mergec.runtime.session.stores.journal import Head, Journal, append, read_journal
from mergec.runtime.session.stores.keys import AnswerKey, KeyFile


class Store:
    """One party's part of a store.

    Both parties use answers in order, the client first: it enters an answer, and then tells the
    server, which enters it too. So a crash leaves the client at most one answer ahead. When the
    next session opens the server then skips that answer (`follow`): no mask of it was or will be
    used by the server. Any other difference shows that one part was restored from a backup or
    copied, and the session is refused.
    """

    def __init__(
        self, folder: Path, header: Header, key: bytes, keys: KeyFile, static: bytes
    ) -> None:
        self.folder = folder
        self.header = header
        self.salt = bytes.fromhex(header.salt)
        self._key = key
        self._keys = keys
        self._open: Corrections | None = None
        self._held = ExitStack()
        self.static = static
        """Seed of what all answers share: static masks of weights, or shared constants."""

    @classmethod
    def open(cls, folder: Path, key: bytes) -> Store:
        """Read a store; raises StoreError if it is missing, damaged, or under another key."""
        data = read_file(folder, HEADER)
        header = read_header(folder, data)
        sealed = read_file(folder, STATIC)
        own = derive(key, f"store {header.store} {header.role}")
        static = unseal(own, 0, sealed, data, folder / STATIC)
        store = cls(folder, header, own, KeyFile(folder, own, data), static)
        store.journal()
        return store

    def hold(self) -> None:
        """Let nobody else hold this store until `release`. The client does so for a session.

        Two sessions at once would take each other's answers for lost. Raises StoreError if another
        process or session holds it.
        """
        try:
            self._held.enter_context(locked(self.folder / HEADER, LOCK_EX | LOCK_NB))
        except BlockingIOError as error:
            raise StoreError(
                f"{self.folder}: is in use by another session of this client; end that one, or "
                "prepare another store"
            ) from error
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be read ({error.strerror})") from error

    def release(self) -> None:
        """Close the answer that was taken, and let others hold the store."""
        self.close()
        self._held.close()

    def journal(self) -> Journal:
        """The journal; raises StoreError if it, or the key file, was changed or restored."""
        with self._locked(LOCK_SH):
            return self._state()[0]

    def left(self) -> int:
        """The number of unused answers."""
        return self.header.answers - self.journal().head.used

    def take(self, tag: bytes, client: Head | None = None) -> tuple[Head, bytes, Corrections]:
        """Use up the next answer for good, in the session with this tag.

        client: at the server, the head that the client has come to; raises PartyError, and uses
        nothing, if this party would come to another one. Returns the journal's head, the answer's
        seed, and the dealer's corrections. Closes the answer taken before. Raises StoreError if
        none is left.
        """
        self.close()
        with self._locked():
            mine = self._state()[0].head
            if client is not None and client != mine.after(tag):
                raise PartyError(differing(self.header.store, client, mine))
            head, key = self._use(tag)
        self._open = Corrections(answer_file(self.folder, key.answer), key.own)
        return head, self._open.seed, self._open

    def follow(self, client: Head, tag: bytes) -> bool:
        """Compare heads with the client's; at the server, when a session opens.

        client: the client's head. tag: of the last entry in its journal. Returns whether an answer
        was skipped: the last one that the client has used, and this party has not. Raises
        PartyError if the two parts do not belong together any more.
        """
        with self._locked():
            mine = self._state()[0].head
            if client == mine:
                return False
            if client == mine.after(tag) and client.used <= self.header.answers:
                _, key = self._use(tag)
                with suppress(FileNotFoundError):
                    answer_file(self.folder, key.answer).unlink()
                sync_folder(self.folder)
                return True
        raise PartyError(differing(self.header.store, client, mine))

    def close(self) -> None:
        """Close the answer that was taken."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @contextmanager
    def _locked(self, how: int = LOCK_EX) -> Iterator[None]:
        """Hold the lock of journal and keys; turn errors of the file system into a StoreError."""
        try:
            with locked(self.folder, how):
                yield
        except OSError as error:
            raise StoreError(
                f"{self.folder}: cannot write the journal ({error.strerror}); free some space"
            ) from error

    def _state(self) -> tuple[Journal, AnswerKey]:
        """The journal and the current key, which must agree.

        The journal is written first. So after a crash the key may be one behind, or the journal may
        end in an incomplete entry while the key is that of this answer; both are harmless, as the
        answer was not used. Anything else shows that one of the files was changed or restored.
        """
        journal, key = read_journal(self.folder, self.header, self._key), self._keys.read()
        behind = journal.head.used - key.answer
        if behind not in (0, 1) or (behind and journal.torn) or key.answer > self.header.answers:
            raise StoreError(
                f"{self.folder}: {JOURNAL} and keys do not belong together: one of them was "
                "changed or restored from a backup; run `mergec prepare` again"
            )
        return journal, key

    def _use(self, tag: bytes) -> tuple[Head, AnswerKey]:
        """Enter the next answer in the journal, and erase its key; returns this key."""
        journal, key = self._state()
        if journal.head.used > key.answer:  # a crash came between the two steps below
            key = self._keys.advance(key)
        self._keys.clear(key)
        if key.answer >= self.header.answers:
            raise StoreError(f"{self.folder}: is used up; run `mergec prepare` again")
        head = append(self.folder, self._key, journal.head, tag)
        self._keys.advance(key)
        return head, key


def differing(store: str, client: Head, server: Head) -> str:
    """Why the two parts of a store, with these heads, can no longer be used."""
    counts = f"the client has used {client.used} answers of it, the server {server.used}"
    if client.used == server.used:
        counts = "they have used other answers"
    return (
        f"the two parts of store {store[:8]} do not match: {counts}; one part was restored from a "
        "backup or copied, so remove both and run `mergec prepare` again"
    )


class NoCorrections:
    """Stands for corrections in the setup of a session from a store, which has none."""

    def read(self, nbytes: int) -> torch.Tensor:
        raise PartyError("this program cannot run from a store; start a session with the dealer")


class Corrections:
    """Reads an answer's seed and corrections from its file, which is unlinked once it is open.

    So nothing stays in the folder, however the answer ends.
    """

    def __init__(self, file: Path, key: bytes) -> None:
        self._path, self._key = file, key
        try:
            self._file = file.open("rb")
            file.unlink()
            sync_folder(file.parent)
        except OSError as error:
            raise StoreError(f"{file}: cannot be read ({error.strerror})") from error
        self._chunk = np.empty(0, np.uint8)
        self._number = 0
        self.seed = self._next()
        """The party's seed for this answer."""

    def read(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` bytes, as a new tensor."""
        result = np.empty(nbytes, np.uint8)
        done = 0
        while done < nbytes:
            part = self._part(nbytes - done)
            result[done : done + len(part)] = part
            done += len(part)
        return torch.from_numpy(result)

    def skip(self, nbytes: int) -> None:
        """Pass over the next `nbytes` bytes."""
        while nbytes:
            nbytes -= len(self._part(nbytes))

    def _part(self, most: int) -> np.ndarray:
        """The next bytes, at most `most`, and no more than are decrypted."""
        if not len(self._chunk):
            self._chunk = np.frombuffer(self._next(), np.uint8)
        part, self._chunk = self._chunk[:most], self._chunk[most:]
        return part

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
