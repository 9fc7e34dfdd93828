"""Randomness dealt ahead of time, on disk: for so many answers, each used once.

A store is a folder that either party has under the same number. It holds the party's seed and the
dealer's corrections for it, one file per answer in the order of use, all encrypted by AES-256-GCM
under a key of the party's own. An answer is entered in a journal, and the
journal brought to disk, before a mask of it is used: what a crash interrupts is lost, never reused.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mergec.runtime.core.errors import MergecError, PartyError
from mergec.runtime.correlations.prg import SEED_BYTES, derive
from mergec.runtime.program.encoding import is_a

KEY_VARIABLE = "MERGEC_STORE_KEY"
FORMAT = 1
CHUNK_BYTES = 1 << 20
SYNC_BYTES = 32 << 20
"""Bytes of an answer that may be in memory alone: the others wait while a party brings it to disk.
A slow one takes this much long before they give up, and all of a long answer perhaps not."""

_HEADER, _SEED, _JOURNAL = "store.json", "seed.bin", "used"
_LENGTH = struct.Struct("!I")
_NUMBER = struct.Struct("!Q")
_NONCE_BYTES = 12


class StoreError(MergecError):
    """A store is missing, damaged, used up, or of something else."""


@dataclass(frozen=True)
class Header:
    """What a store is for. The parties' are equal but for `role`, `client` and `weights`.

    answers, prompt, tokens: its plan (`session.handshake.Plan`). client: who may use it, at the
    server. weights: digest of the server's weights. They are hidden under one mask as long as the
    store lasts, so it must not serve others: the client could take their difference.
    """

    store: str
    role: str
    program: str
    answers: int
    prompt: int
    tokens: int
    client: str = ""
    weights: str = ""
    format: int = FORMAT

    @property
    def common(self) -> dict[str, Any]:
        """What must be the same at both parties."""
        return {k: v for k, v in asdict(self).items() if k not in ("role", "client", "weights")}


def new_store() -> str:
    """A number for a store."""
    return secrets.token_hex(16)


def is_store(text: object) -> bool:
    """Whether `text` can be a store's number, and so a folder's name."""
    return isinstance(text, str) and len(text) == 32 and set(text) <= set("0123456789abcdef")


def read_key(file: Path | None) -> bytes:
    """The key that stores are encrypted under: 64 hexadecimal digits, from a file or the variable.

    It never goes over the network, and the parties' keys have nothing to do with each other.
    """
    try:
        text = file.read_text() if file is not None else os.environ.get(KEY_VARIABLE, "")
        key = bytes.fromhex(text.strip())
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError:
        key = b""
    if len(key) != SEED_BYTES:
        where = str(file) if file is not None else f"--store-key and {KEY_VARIABLE}"
        raise StoreError(
            f"{where}: no key of 64 hexadecimal digits; make one by `openssl rand -hex 32`"
        )
    return key


class Store:
    """One party's part of a store."""

    def __init__(self, folder: Path, header: Header, key: bytes, seed: bytes) -> None:
        self.folder = folder
        self.header = header
        self._key = key
        self._open: Corrections | None = None
        self.seed = seed
        """Of what belongs to no answer: the static masks of weights."""

    @classmethod
    def open(cls, folder: Path, key: bytes) -> Store:
        """Read a store; StoreError when it is missing, damaged, or of another key."""
        data = _read(folder, _HEADER)
        header = _header(folder, data)
        sealed = _read(folder, _SEED)
        own = derive(key, f"store {header.store} {header.role}")
        seed = _unseal(own, 0, sealed, data, folder / _SEED)
        return cls(folder, header, own, seed)

    def left(self) -> list[int]:
        """Answers that have not been used, in order."""
        used = _used(self.folder)
        return [n for n in range(self.header.answers) if n not in used]

    def take(self, answer: int) -> tuple[bytes, Corrections]:
        """Use up an answer, for good; gives its seed and the dealer's corrections.

        Ends with the answer taken before. StoreError if this one was used before.
        """
        self.close()
        self._note(answer)
        self._open = Corrections(
            _answer_file(self.folder, answer), derive(self._key, f"answer {answer}")
        )
        return derive(self.seed, f"answer {answer}"), self._open

    def close(self) -> None:
        """Nobody needs the answer that was taken any more."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _note(self, answer: int) -> None:
        """Enter an answer in the journal, and bring that to disk."""
        with (self.folder / _JOURNAL).open("ab+") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            if not 0 <= answer < self.header.answers or answer in _used(self.folder):
                raise StoreError(f"{self.folder}: answer {answer} is used up or does not exist")
            try:
                # A crash may have left half an entry; that answer was never begun.
                os.truncate(journal.fileno(), self._whole() * _NUMBER.size)
                journal.write(_NUMBER.pack(answer))
                journal.flush()
                os.fsync(journal.fileno())
            except OSError as error:
                raise StoreError(
                    f"{self.folder}: cannot note what is used ({error.strerror}); free some space"
                ) from error

    def _whole(self) -> int:
        return (self.folder / _JOURNAL).stat().st_size // _NUMBER.size


class NoCorrections:
    """Corrections where there are none: in the setup of a session from a store."""

    def read(self, nbytes: int) -> torch.Tensor:
        raise PartyError("this program cannot run from a store; begin a session with the dealer")


class Corrections:
    """Reads an answer's corrections from its file, whose name is gone as soon as it is open.

    So whatever ends the answer leaves nothing behind.
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
        """The next `nbytes` bytes, in memory of their own."""
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
        """Nobody needs this any more."""
        self._file.close()

    def _next(self) -> bytes:
        head = self._file.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise StoreError(f"{self._path}: is too short for this answer; prepare again")
        (size,) = _LENGTH.unpack(head)
        if size > 2 * CHUNK_BYTES:
            raise StoreError(f"{self._path}: is damaged; prepare again")
        chunk = _unseal(self._key, self._number, self._file.read(size), b"", self._path)
        self._number += 1
        return chunk


class StoreWriter:
    """Writes a store beside its place; `finish` puts it there, whole and on disk."""

    def __init__(
        self, root: Path, header: Header, key: bytes, seed: bytes, limit: int = 1 << 62
    ) -> None:
        """`limit`: bytes that it may take."""
        self.size = 0
        self._header, self._limit = header, limit
        self._key = derive(key, f"store {header.store} {header.role}")
        self._target = root / header.store
        self._folder = root / f".{header.store}"
        self._answer = 0
        self._number = 0
        self._gathered = bytearray()
        self._file: Any = None
        self._unsynced = 0
        self._held = ExitStack()
        try:
            with self._told():
                self._begin(seed)
        except BaseException:
            self._discard()
            raise

    def _begin(self, seed: bytes) -> None:
        root = self._target.parent
        root.mkdir(parents=True, exist_ok=True)
        remove_unfinished(root)
        with _locked(root):
            self._folder.mkdir(mode=0o700)
            self._held.enter_context(_locked(self._folder))
        data = json.dumps(asdict(self._header)).encode()
        self._put(_HEADER, data)
        self._put(_SEED, _seal(self._key, 0, seed, data))

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
        """Remove what is not finished."""
        if self._file is not None:
            with suppress(OSError):  # what was not written cannot be, and is not needed
                self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._held.close()

    def write(self, data: memoryview) -> None:
        """Corrections of the answer that is under way."""
        self._gathered += data
        while len(self._gathered) >= CHUNK_BYTES:
            self._flush(CHUNK_BYTES)

    def end_answer(self) -> None:
        """The answer is complete."""
        self._flush(len(self._gathered))
        with self._told():
            self._sync()
            self._file.close()
        self._file = None
        self._answer += 1
        self._number = 0

    def finish(self) -> None:
        """Bring the store to disk and put it in its place."""
        with self._told():
            _sync(self._folder)
            self._folder.rename(self._target)
            _sync(self._target.parent)

    def _flush(self, count: int) -> None:
        sealed = _seal(
            derive(self._key, f"answer {self._answer}"),
            self._number,
            bytes(self._gathered[:count]),
            b"",
        )
        del self._gathered[:count]
        self.size += len(sealed) + _LENGTH.size
        if self.size > self._limit:
            raise StoreError(f"{self._target}: a store may have {self._limit} bytes; ask for less")
        with self._told():
            if self._file is None:
                self._file = _answer_file(self._folder, self._answer).open("xb")
            self._file.write(_LENGTH.pack(len(sealed)) + sealed)
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

    def _told(self) -> _Told:
        return _Told(self._target)


class _Told:
    """Says what the file system refuses in one line."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StoreError(
                f"{self._target}: cannot be written ({error.strerror}); free some space or choose "
                "another place"
            ) from error


def stores_below(root: Path) -> list[Path]:
    """The folders of all stores in `root`."""
    try:
        return sorted(place for place in root.iterdir() if is_store(place.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{root}: cannot be read ({error.strerror})") from error


def left_below(root: Path) -> dict[str, tuple[int, int]]:
    """Answers and tokens that stores in `root` are left with, by the client who may use them.

    No key is needed; those whose header cannot be read count for nothing.
    """
    found: dict[str, tuple[int, int]] = {}
    for folder in stores_below(root):
        with suppress(StoreError):
            header = _header(folder, _read(folder, _HEADER))
            left = header.answers - len(_used(folder))
            answers, tokens = found.get(header.client, (0, 0))
            found[header.client] = answers + left, tokens + left * header.tokens
    return found


def remove_store(root: Path, number: str) -> None:
    """Remove a store that the other party has no part of."""
    shutil.rmtree(root / number, ignore_errors=True)


def remove_unfinished(root: Path) -> int:
    """Remove what preparations that were killed left behind; gives how many."""
    removed = 0
    if not root.is_dir():
        return removed
    with _locked(root):
        for place in root.iterdir():
            if place.name[:1] == "." and is_store(place.name[1:]):
                # A preparation that is under way holds its folder's lock, and may end right now.
                with (
                    suppress(BlockingIOError, FileNotFoundError),
                    _locked(place, fcntl.LOCK_EX | fcntl.LOCK_NB),
                ):
                    shutil.rmtree(place, ignore_errors=True)
                    removed += 1
    return removed


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"{folder}: no such store; make one with `mergec prepare`") from error
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read ({error.strerror})") from error


def _header(folder: Path, data: bytes) -> Header:
    try:
        found = json.loads(data)
        header = Header(**found)
        numbers = all(is_a(found[k], int) for k in ("answers", "prompt", "tokens", "format"))
        texts = all(is_a(found[k], str) for k in ("store", "client"))
        if header.format != FORMAT or not numbers or not texts:
            raise ValueError("format")
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{folder / _HEADER}: is damaged or of another version; prepare again"
        ) from error
    return header


def _used(folder: Path) -> set[int]:
    """Answers in the journal. Half an entry, which a crash leaves, is none."""
    try:
        data = (folder / _JOURNAL).read_bytes()
    except FileNotFoundError:
        return set()
    whole = len(data) // _NUMBER.size * _NUMBER.size
    return {number for (number,) in _NUMBER.iter_unpack(data[:whole])}


def _answer_file(folder: Path, answer: int) -> Path:
    return folder / f"answer-{answer:06}.bin"


def _seal(key: bytes, number: int, data: bytes, context: bytes) -> bytes:
    """Each key seals the numbers from 0 once, so no nonce comes twice under it."""
    return AESGCM(key).encrypt(number.to_bytes(_NONCE_BYTES, "big"), data, context)


def _unseal(key: bytes, number: int, data: bytes, context: bytes, file: Path) -> bytes:
    try:
        return AESGCM(key).decrypt(number.to_bytes(_NONCE_BYTES, "big"), data, context)
    except InvalidTag as error:
        raise StoreError(f"{file}: is damaged, or encrypted under another key") from error


@contextmanager
def _locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds a lock of the folder, which ends with the process at the latest."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
