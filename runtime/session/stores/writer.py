"""Writes a store beside its place; once it is complete and on disk, it is moved there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from mergec.runtime.correlations.prg import derive, new_seed
from mergec.runtime.session.stores.folder import locked, remove_unfinished
from mergec.runtime.session.stores.format import (
    CHUNK_BYTES,
    HEADER,
    JOURNAL,
    KEYS,
    LENGTH,
    STATIC,
    Header,
    StoreError,
    answer_file,
    seal,
    sync_folder,
)
from mergec.runtime.session.stores.keys import AnswerKey, KeyFile

SYNC_BYTES = 32 << 20
"""Bytes of an answer that may be in memory only: the others wait while a party flushes to disk.
Even a slow disk takes this much well within their timeout, but perhaps not all of a long answer."""


class StoreWriter:
    """Writes a store to a temporary folder; `finish` moves it to its place once it is on disk."""

    def __init__(
        self,
        root: Path,
        header: Header,
        key: bytes,
        seed: bytes,
        static: bytes,
        limit: int = 1 << 62,
    ) -> None:
        """seed: the party's in the session that deals; those of the answers follow from it, and it
        is not stored. static: seed of what all answers share, from which none of theirs follows.
        limit: maximum size of the store in bytes.
        """
        self.size = 0
        self._header, self._limit = header, limit
        self._key = derive(key, f"store {header.store} {header.role}")
        self._seed, self._answer_key = seed, AnswerKey(0, new_seed())
        self._target = root / header.store
        self._folder = root / f".{header.store}"
        self._number = 0
        self._gathered = bytearray()
        self._file: Any = None
        self._unsynced = 0
        self._held = ExitStack()
        try:
            with self._told():
                self._begin(static)
        except BaseException:
            self._discard()
            raise

    def _begin(self, static: bytes) -> None:
        root = self._target.parent
        missing = [place for place in (root, *root.parents) if not place.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for place in missing:
            sync_folder(place.parent)
        remove_unfinished(root)
        with locked(root):
            self._folder.mkdir(mode=0o700)
            self._held.enter_context(locked(self._folder))
        data = json.dumps(asdict(self._header)).encode()
        self._put(HEADER, data)
        self._put(STATIC, seal(self._key, 0, static, data))
        self._put(KEYS, KeyFile(self._folder, self._key, data).first(self._answer_key.secret))
        self._put(JOURNAL, b"")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        """Remove what has not been finished."""
        if self._file is not None:
            with suppress(OSError):  # what could not be written is not needed either
                self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._held.close()

    def write(self, data: memoryview) -> None:
        """Append corrections of the current answer."""
        self._gathered += data
        while len(self._gathered) >= CHUNK_BYTES:
            self._flush(CHUNK_BYTES)

    def end_answer(self) -> None:
        """Complete the current answer, and flush it to disk."""
        if self._gathered or self._file is None:
            self._flush(len(self._gathered))
        with self._told():
            self._sync()
            self._file.close()
        self._file = None
        self._answer_key = self._answer_key.following
        self._number = 0

    def finish(self) -> None:
        """Flush the store to disk and move it to its place."""
        with self._told():
            sync_folder(self._folder)
            self._folder.rename(self._target)
            sync_folder(self._target.parent)

    def _flush(self, count: int) -> None:
        """Write a chunk of the answer's file. The first one is the party's seed for the answer."""
        if self._file is None:
            self._write(derive(self._seed, f"answer {self._answer_key.answer}"))
        self._write(bytes(self._gathered[:count]))
        del self._gathered[:count]

    def _write(self, chunk: bytes) -> None:
        sealed = seal(self._answer_key.own, self._number, chunk, b"")
        self.size += len(sealed) + LENGTH.size
        if self.size > self._limit:
            raise StoreError(f"{self._target}: a store may have {self._limit} bytes; prepare less")
        with self._told():
            if self._file is None:
                file = answer_file(self._folder, self._answer_key.answer)
                self._file = file.open("xb")
            self._file.write(LENGTH.pack(len(sealed)) + sealed)
            self._unsynced += len(sealed)
            if self._unsynced >= SYNC_BYTES:
                self._sync()
        self._number += 1

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def _put(self, name: str, data: bytes) -> None:
        with (self._folder / name).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.size += len(data)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn errors of the file system into a StoreError of one line."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self._target}: cannot be written ({error.strerror}); free some space or choose "
                "another place"
            ) from error
