"""The format of a store: randomness dealt ahead of time, on disk, for answers that use it once.

Each party has a folder for its part of the store; both folders have the same number as their name.
A folder holds one file per answer, in the order of use: the party's seed for this answer, and the
dealer's corrections for it. A further file holds the seed of what all answers share. All are
encrypted with AES-256-GCM, under a key of the party's own and, for an answer, a key that is erased
when the answer is used (`stores.keys`). A journal lists the answers that have been used.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mergec.runtime.core.errors import MergecError
from mergec.runtime.correlations.prg import SEED_BYTES
from mergec.runtime.program.json_values import is_a
from mergec.runtime.session.requests import Plan

KEY_VARIABLE = "MERGEC_STORE_KEY"
"""Environment variable that holds the key, unless a file does."""

FORMAT = 2
CHUNK_BYTES = 1 << 20
"""Bytes of corrections that are encrypted together."""

HEADER, STATIC, KEYS, JOURNAL = "store.json", "static.bin", "keys.bin", "journal"
"""Names of a store's files, besides those of the answers."""

LENGTH = struct.Struct("!I")
"""Before each chunk in an answer's file: its encrypted size in bytes."""

NUMBER = struct.Struct("!Q")
"""An answer's number."""

_NONCE_BYTES = 12


class StoreError(MergecError):
    """A store is missing, damaged, used up, or belongs to something else."""


@dataclass(frozen=True)
class Header:
    """What a store is for. The headers of both parties differ in `role`, `client`, `weights` only.

    answers, prompt, tokens, drafts, pace: its plan (`session.requests.Plan`). salt: that of the
    session in which it was dealt (`correlations.dpf`), in hexadecimal; public. client: at the
    server, the client that may use the store. weights: digest of the server's weights. One mask
    hides the weights for as long as the store lasts, so the store must not serve other weights: the
    client could compute the difference of the two.
    """

    store: str
    role: str
    program: str
    answers: int
    prompt: int
    tokens: int
    salt: str
    client: str = ""
    weights: str = ""
    drafts: int = 0
    pace: int = 0
    format: int = FORMAT

    @property
    def plan(self) -> Plan:
        """The plan of its answers."""
        return Plan(self.answers, self.prompt, self.tokens, self.drafts, self.pace)

    @property
    def common(self) -> dict[str, Any]:
        """The fields that must be the same at both parties."""
        return {k: v for k, v in asdict(self).items() if k not in ("role", "client", "weights")}


def new_store() -> str:
    """A fresh random number for a store: 16 bytes, in hexadecimal."""
    return secrets.token_hex(16)


def is_store(text: object) -> bool:
    """Whether `text` is a valid number of a store, and so safe as the name of a folder."""
    return isinstance(text, str) and len(text) == 32 and set(text) <= set("0123456789abcdef")


def read_key(file: Path | None) -> bytes:
    """The key that stores are encrypted under: 64 hexadecimal digits, in `file` or KEY_VARIABLE.

    It never goes over the network, and the parties' keys are independent. Raises StoreError if
    there is no such key.
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
            f"{where}: no key of 64 hexadecimal digits; create one with `openssl rand -hex 32`"
        )
    return key


def read_file(folder: Path, name: str) -> bytes:
    """The contents of one of a store's files; raises StoreError if there are none."""
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        if name == HEADER:
            told = f"{folder}: no such store; create one with `mergec prepare`"
        else:
            told = f"{folder / name}: is missing; run `mergec prepare` again"
        raise StoreError(told) from error
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read ({error.strerror})") from error


def read_header(folder: Path, data: bytes) -> Header:
    """A store's header from its file; raises StoreError if it is damaged."""
    try:
        found = json.loads(data)
        header = Header(**found)
        numbers = all(is_a(v, int) for v in (*header.plan.fields().values(), header.format))
        texts = ("store", "role", "program", "salt", "client", "weights")
        if header.format != FORMAT or not numbers or not all(is_a(found[k], str) for k in texts):
            raise ValueError("format")
        bytes.fromhex(header.salt)
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{folder / HEADER}: is damaged or of another version; run `mergec prepare` again"
        ) from error
    return header


def answer_file(folder: Path, answer: int) -> Path:
    """The file of an answer's corrections."""
    return folder / f"answer-{answer:06}.bin"


def seal(key: bytes, number: int, data: bytes, context: bytes) -> bytes:
    """Encrypt `data` and authenticate it together with `context`.

    The nonce is `number`. Each key encrypts each number once, so no nonce repeats under a key.
    """
    return AESGCM(key).encrypt(number.to_bytes(_NONCE_BYTES, "big"), data, context)


def unseal(key: bytes, number: int, data: bytes, context: bytes, file: Path) -> bytes:
    """Undo `seal`; raises StoreError, which names `file`, if the data is not authentic."""
    try:
        return unsealed(key, number, data, context)
    except InvalidTag as error:
        raise StoreError(f"{file}: is damaged, or encrypted under another key") from error


def unsealed(key: bytes, number: int, data: bytes, context: bytes) -> bytes:
    """Undo `seal`; raises InvalidTag if the data is not authentic."""
    return AESGCM(key).decrypt(number.to_bytes(_NONCE_BYTES, "big"), data, context)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk: that files in it were made, moved or removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
