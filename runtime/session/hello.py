"""The hello that roles exchange and compare before any secret is shared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from mergec.runtime.core.errors import PartyError
from mergec.runtime.core.spec import FRACTIONAL_BITS, RING_BITS, ROLES
from mergec.runtime.program.encoding import is_a
from mergec.runtime.program.manifest import Manifest

PROTOCOL_VERSION = 3
"""Incremented with every change to the messages between parties."""

MODES = ("mergec", "crypten")


@dataclass(frozen=True)
class Hello:
    """What must be the same at all roles, except `role`; `compare` checks it.

    passes: names of the passes that shaped the program, with how often each applied.
    debug: options that change what is sent, such as insecure randomness.
    """

    role: str
    mode: str
    program_hash: str
    passes: tuple[str, ...] = ()
    fixed: int = FRACTIONAL_BITS
    ring: int = RING_BITS
    debug: int = 0
    version: int = PROTOCOL_VERSION

    @classmethod
    def of(cls, role: str, manifest: Manifest, mode: str = "mergec", debug: int = 0) -> Hello:
        """The hello of a role, from the manifest of its bundle."""
        return cls(
            role,
            mode,
            manifest.program_hash,
            tuple(f"{p.get('pass')}:{p.get('sites')}" for p in manifest.passes),
            manifest.fractional_bits,
            manifest.ring_bits,
            debug,
        )

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self) -> bytes:
        return json.dumps(self.fields()).encode()

    @classmethod
    def decode(cls, data: bytes, peer: str) -> Hello:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _unreadable(peer) from error
        return cls.read(found, peer)

    @classmethod
    def read(cls, found: Any, peer: str) -> Hello:
        """Read a hello from the peer's fields; other fields are ignored."""
        if not isinstance(found, dict) or not is_a(found.get("version"), int):
            raise _unreadable(peer)
        if found["version"] != PROTOCOL_VERSION:
            # The meaning of the other fields belongs to that version.
            return cls(peer, MODES[0], "", version=found["version"])
        passes = found.get("passes")
        if not isinstance(passes, list) or not all(isinstance(name, str) for name in passes):
            raise _unreadable(peer)
        kinds = {
            "role": str,
            "mode": str,
            "program_hash": str,
            "fixed": int,
            "ring": int,
            "debug": int,
        }
        if not all(is_a(found.get(key), kind) for key, kind in kinds.items()):
            raise _unreadable(peer)
        if found["role"] not in ROLES or found["mode"] not in MODES:
            raise _unreadable(peer)
        rest = {key: found[key] for key in kinds}
        return cls(**rest, passes=tuple(passes), version=found["version"])


def _unreadable(peer: str) -> PartyError:
    return PartyError(f"the {peer} sent a malformed hello; install the same mergec everywhere")


def compare(mine: Hello, theirs: Hello, peer: str) -> None:
    """Raise a PartyError that names the first difference, if there is one, and the remedy."""
    bundles = "use the bundles of one compilation for all three"
    if mine.version != theirs.version:
        differing = f"speaks version {theirs.version} of the protocol, this party {mine.version}"
        remedy = "install the same mergec everywhere"
    elif theirs.role != peer:
        differing = f"was expected, but the peer says it is the {theirs.role}"
        remedy = "start each role once"
    elif mine.mode != theirs.mode:
        differing = f"runs in mode {theirs.mode}, this party in mode {mine.mode}"
        remedy = "use the same --mode for all three"
    elif mine.ring != theirs.ring:
        differing = f"computes in a ring of {theirs.ring} bits, this party of {mine.ring}"
        remedy = "install the same mergec everywhere"
    elif mine.fixed != theirs.fixed:
        differing = f"computes with {theirs.fixed} fractional bits, this party with {mine.fixed}"
        remedy = bundles
    elif mine.passes != theirs.passes:
        odd = sorted(set(mine.passes) ^ set(theirs.passes)) or ["their order"]
        differing = f"has a program of other passes ({', '.join(odd)[:120]})"
        remedy = bundles
    elif mine.program_hash != theirs.program_hash:
        differing = (
            f"has the program {theirs.program_hash[:12]}, this party {mine.program_hash[:12]}"
        )
        remedy = bundles
    elif mine.debug != theirs.debug:
        differing = "was started with different debugging options"
        remedy = "start all three with the same ones"
    else:
        return
    raise PartyError(f"the {peer} {differing}; {remedy}")
