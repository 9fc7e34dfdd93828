"""The journal of a store: an entry for each answer that was used, in order.

Answers are used in the order of their numbers, so the number of entries is the number of the next
answer. The *head* of a journal is this number, and a hash of the store's header and all entries. It
is the same at both parties as long as both have used the same answers in the same sessions, so they
compare heads when a session opens. An entry is authenticated by a MAC over the hash up to it, under
a key of the party's own: nobody else can write, change or reorder entries, or use those of another
store. That entries were removed from the end shows in the key file (`stores.keys`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from string import hexdigits
from typing import Any, NamedTuple

from mergec.runtime.core.errors import PartyError
from mergec.runtime.correlations.prg import derive
from mergec.runtime.program.json_values import is_a
from mergec.runtime.session.stores.format import JOURNAL, Header, StoreError, read_file

TAG_BYTES = 16
HASH_BYTES = 32

_ENTRY = struct.Struct(f"!Q{TAG_BYTES}s{HASH_BYTES}s")
"""An entry: the answer's number, the tag of the session that used it, and the MAC."""

_NUMBER = struct.Struct("!Q")


class Head(NamedTuple):
    """used: number of answers that were used. chain: hash of the header and of all entries."""

    used: int
    chain: bytes

    def after(self, tag: bytes) -> Head:
        """The head once the session with this tag has used the next answer."""
        return Head(self.used + 1, _hash(self.chain + _NUMBER.pack(self.used) + tag))

    def fields(self) -> dict[str, Any]:
        return {"used": self.used, "chain": self.chain.hex()}

    @classmethod
    def read(cls, found: Any, peer: str) -> Head:
        """Read a head from a peer's fields; raises PartyError if it is malformed."""
        if isinstance(found, dict):
            used, chain = found.get("used"), _bytes(found.get("chain"), HASH_BYTES)
            if is_a(used, int) and 0 <= used < 1 << 32 and chain is not None:
                return cls(used, chain)
        raise PartyError(
            f"the {peer} does not say what it has used of the store; install the same mergec "
            "everywhere"
        )


def tag_of(token: str) -> bytes:
    """The tag of a session: a hash of its secret name, which both parties know."""
    return hashlib.blake2b(token.encode(), digest_size=TAG_BYTES).digest()


@dataclass(frozen=True)
class Journal:
    """What a journal's file contains.

    tag: the session's of the last entry; zeros without entries. torn: whether an entry follows that
    a crash left incomplete.
    """

    head: Head
    tag: bytes = bytes(TAG_BYTES)
    torn: bool = False

    def fields(self) -> dict[str, Any]:
        """What the client tells the server when a session opens."""
        return {"head": self.head.fields(), "tag": self.tag.hex()}


def read_tag(found: Any, peer: str) -> bytes:
    """Read the tag of a session from a peer's fields; raises PartyError if it is malformed."""
    tag = _bytes(found, TAG_BYTES)
    if tag is None:
        raise PartyError(f"the {peer} names no session; install the same mergec everywhere")
    return tag


def read_journal(folder: Path, header: Header, key: bytes) -> Journal:
    """Read and check a journal; `key`: that of the party's part of the store.

    Raises StoreError if it is missing, or an entry other than the last one is not authentic.
    Whether the last one may be incomplete is for `stores.reader` to decide.
    """
    data, secret = read_file(folder, JOURNAL), derive(key, "journal")
    found = Journal(Head(0, _hash(json.dumps(header.common, sort_keys=True).encode())))
    for start in range(0, len(data), _ENTRY.size):
        entry = data[start : start + _ENTRY.size]
        after = None
        if len(entry) == _ENTRY.size:
            number, tag, mac = _ENTRY.unpack(entry)
            after = found.head.after(tag)
            if number != found.head.used or not hmac.compare_digest(mac, _mac(secret, after)):
                after = None
        if after is None:
            if start + _ENTRY.size < len(data):
                raise StoreError(
                    f"{folder / JOURNAL}: was changed or is damaged; run `mergec prepare` again"
                )
            return Journal(found.head, found.tag, torn=True)
        found = Journal(after, tag)
    return found


def append(folder: Path, key: bytes, head: Head, tag: bytes) -> Head:
    """Enter that the session with this tag uses the next answer, and flush the journal to disk.

    head: that of the journal; an incomplete entry behind it is overwritten. Returns the new head.
    Raises OSError if the entry cannot be written.
    """
    after = head.after(tag)
    entry = _ENTRY.pack(head.used, tag, _mac(derive(key, "journal"), after))
    # The file was made, and its name flushed to disk, together with the store.
    with (folder / JOURNAL).open("rb+") as journal:
        journal.truncate(head.used * _ENTRY.size)
        journal.seek(0, os.SEEK_END)
        journal.write(entry)
        journal.flush()
        os.fsync(journal.fileno())
    return after


def count_entries(folder: Path) -> int:
    """The number of entries, which are not checked: this needs no key."""
    return len(read_file(folder, JOURNAL)) // _ENTRY.size


def _bytes(text: object, size: int) -> bytes | None:
    """So many bytes in hexadecimal; None if it is anything else."""
    if not isinstance(text, str) or len(text) != 2 * size or not set(text) <= set(hexdigits):
        return None
    return bytes.fromhex(text)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES, person=b"mergec journal").digest()


def _mac(key: bytes, head: Head) -> bytes:
    return hashlib.blake2b(head.chain, key=key, digest_size=HASH_BYTES).digest()
