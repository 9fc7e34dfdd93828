"""Hostile peers: recorded sessions, mutated and played to each role.

Every role must end such a session with an error of one line: never with one of ours, never by
allocating what a peer asks for, and without sending what belongs behind a step that did not happen.
MERGEC_FUZZ_FRAMES sets how many frames each connection of each role gets (`make fuzz`).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mergec.runtime.core.errors import MergecError, PartyError
from mergec.runtime.correlations.dpf import new_salt
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.engine.weights import take_weights
from mergec.runtime.program.bundle import load_bundle
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.dealer_session import DealerSession
from mergec.runtime.roles.server_session import ServerSession
from mergec.runtime.roles.settings import DealerSettings, ServerSettings
from mergec.runtime.roles.worker import Parent
from mergec.runtime.session.handshake import new_token
from mergec.runtime.session.hello import Hello, compare
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.connect import Security
from mergec.runtime.transport.frames import Kind
from tests import decoder
from tests.services import role

HEADER = struct.Struct("!BxxxIQ")
FRAMES = int(os.environ.get("MERGEC_FUZZ_FRAMES", "60"))
BATCH = 200
ROOM = 1 << 32
"""Bytes that this process may take beyond what it has: what a hostile length would exceed."""

PATIENCE = 20.0
"""Seconds within which the threads of a session that is over end."""

KEPT = 1 << 18
"""Bytes that a session may leave behind here, where all share one process."""

FIELDS = [
    *("role", "version", "mode", "program_hash", "passes", "fixed", "purpose", "session", "store"),
    *("plan", "position", "length", "tokens", "answer", "answers", "prompt", "reason", "used"),
    *("head", "tag", "chain", "salt"),
]
PLAIN = {name: Security(name, None, plaintext=True) for name in ("client", "server", "dealer")}
NOWHERE = Address("127.0.0.1", 1)


class Tap:
    """Relays a connection, and records what either side sent."""

    def __init__(self, target: Address) -> None:
        self.said: list[tuple[bytearray, bytearray]] = []
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address(*self._listener.getsockname()[:2])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._target.host, self._target.port))
                kept = (bytearray(), bytearray())
                self.said.append(kept)
                for one, other, into in ((near, far, kept[0]), (far, near, kept[1])):
                    threading.Thread(target=self._copy, args=(one, other, into)).start()

    def _copy(self, one: socket.socket, other: socket.socket, into: bytearray) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                into += data
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


@dataclasses.dataclass
class Recorded:
    """The frames of one session, by connection: what each end sent."""

    bundles: Path
    to_server: list[bytes]
    to_client: list[bytes]
    server_to_dealer: list[bytes]
    dealer_to_server: list[bytes]
    client_to_dealer: list[bytes]
    dealer_to_client: list[bytes]


def frames(data: bytes) -> list[bytes]:
    """Split bytes into frames; an incomplete rest is dropped."""
    found, start = [], 0
    while start + HEADER.size <= len(data):
        end = start + HEADER.size + HEADER.unpack_from(data, start)[2]
        if end > len(data):
            break
        found.append(bytes(data[start:end]))
        start = end
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    bundles = decoder.save(tmp_path_factory.mktemp("fuzz"))
    with ExitStack() as stack:
        dealer = stack.enter_context(role("deal", bundles, "--plaintext"))
        to_dealer = Tap(dealer.address)
        at = ("--dealer", str(to_dealer.address))
        server = stack.enter_context(role("serve", bundles, "--plaintext", "--rate", "0", *at))
        to_server = Tap(server.address)
        with Connection(
            bundles / "client",
            server=to_server.address,
            dealer=to_dealer.address,
            security=PLAIN["client"],
            timeout=30.0,
        ) as connection:
            list(connection.generate([5, 1], max_tokens=2))
        dealer.wait_for("session ended", 2)
        ((up, down),) = to_server.said
        pairs = [(frames(one), frames(other)) for one, other in to_dealer.said]
        for tap in (to_dealer, to_server):
            tap.close()
    by_role = {json.loads(said[0][HEADER.size :])["role"]: (said, told) for said, told in pairs}
    return Recorded(
        bundles, frames(up), frames(down), *by_role["server"], *by_role["client"]
    )  # fmt: skip


# ------------------------------------------------------------------------------- mutations


@st.composite
def mutations(draw: Any, original: list[bytes]) -> list[bytes]:
    """Frames that differ from the recorded ones by a few faults, some of which look valid."""
    found = list(original)
    for _ in range(draw(st.integers(1, 3))):
        if not found:
            break
        i = draw(st.integers(0, len(found) - 1))
        frame = found[i]
        kind, number, length = HEADER.unpack(frame[: HEADER.size]) if len(frame) >= 16 else (0,) * 3
        match draw(st.integers(0, 10)):
            case 0:
                del found[i]
            case 1:
                found.insert(i, frame)
            case 2:
                j = draw(st.integers(0, len(found) - 1))
                found[i], found[j] = found[j], found[i]
            case 3 if frame:
                data = bytearray(frame)
                data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
                found[i] = bytes(data)
            case 4:
                found[i] = frame[: draw(st.integers(0, len(frame)))]
            case 5:
                wrong = [0, length // 2, min(length, 2**62) + 1, 2**33, 2**63, 2**64 - 1]
                found[i] = HEADER.pack(kind, number, draw(st.sampled_from(wrong))) + frame[16:]
            case 6:
                found[i] = HEADER.pack(draw(st.integers(0, 255)), number, length) + frame[16:]
            case 7:
                found.insert(i, draw(st.binary(max_size=64)))
            case 8:
                payload = draw(st.binary(max_size=64) | json_payloads())
                found[i] = HEADER.pack(kind, number, len(payload)) + payload
            case 9:
                beats = draw(st.integers(1, 300))
                found[i:i] = [
                    HEADER.pack(Kind.ALIVE, (number + n) % 2**32, 0) for n in range(beats)
                ]
            case _:
                found = found[: i + 1]
    return renumbered(found) if draw(st.booleans()) else found


def json_payloads() -> Any:
    """Objects with the fields that roles read, and arbitrary values."""
    keys = st.sampled_from(FIELDS)
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    return st.dictionaries(keys, values, max_size=5).map(lambda found: json.dumps(found).encode())


def renumbered(found: list[bytes]) -> list[bytes]:
    """The same frames, renumbered as a cleverer attacker would do it."""
    result = []
    for number, frame in enumerate(found):
        if len(frame) >= HEADER.size:
            kind, _, length = HEADER.unpack(frame[: HEADER.size])
            frame = HEADER.pack(kind, number, length) + frame[HEADER.size :]
        result.append(frame)
    return result


# ----------------------------------------------------------------------------------- roles


class Log:
    """Replaces the log; internal errors must not appear in it."""

    def bind(self, **_: Any) -> Log:
        return self

    def info(self, *_: Any, **__: Any) -> None: ...

    def warning(self, *_: Any, **__: Any) -> None: ...

    def error(self, event: str, reason: str = "", place: str = "") -> None:
        raise AssertionError(f"{event}: {reason} {place}")


class Alone(Parent):
    """The parent's side of a session, which grants every request."""

    def __init__(self, claimed: list[str] | None = None, line: list[bytes] | None = None) -> None:
        self.line, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._idle = self._stopping = False
        self._claimed = claimed or []
        self._line = line or []
        self.kept: list[socket.socket] = [self.line, self._other]

    def tell(self, **message: Any) -> None:
        if message["kind"] == "place":
            self._other.send(json.dumps({"session": new_token()}).encode())

    def ask(self, **message: Any) -> tuple[dict[str, Any], list[int]]:
        if message["kind"] == "allowance":
            return {"wait": 0}, []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for packet in self._line:
            theirs.send(packet)
        self.kept.append(theirs)
        seeds = self._claimed[: 1 if message["role"] == "client" else 2]
        return {"seeds": seeds, "salt": new_salt().hex()}, [ours.detach()]

    def close(self) -> None:
        for end in self.kept:
            end.close()


class Wire:
    """Connections that already hold everything that the peer will send."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []

    def end(self, said: list[bytes]) -> tuple[socket.socket, socket.socket]:
        """This role's end and the peer's; the peer has sent everything and closed its direction."""
        peer = socket.create_connection(self._listener.getsockname()[:2])
        own, _ = self._listener.accept()
        peer.sendall(b"".join(said))
        peer.shutdown(socket.SHUT_WR)
        self._open += [peer, own]
        return own, peer

    def heard(self, peer: socket.socket, own: socket.socket) -> list[bytes]:
        """What the role sent."""
        with suppress(OSError):
            own.shutdown(socket.SHUT_WR)
        own.close()
        data = bytearray()
        peer.settimeout(5.0)
        with suppress(OSError):
            while got := peer.recv(1 << 16):
                data += got
        for end in self._open:
            end.close()
        self._open = []
        return frames(bytes(data))


def play_server(recorded: Recorded, wire: Wire, monkeypatch: Any) -> dict[str, Play]:
    program = load_bundle(recorded.bundles / "server", "server")
    encoded = take_weights(program)
    options = ServerSettings(Path(), NOWHERE, PLAIN["server"], NOWHERE, timeout=1.0)

    def play(client: list[bytes], dealer: list[bytes], fuzzed: int) -> list[bytes]:
        ends = [wire.end(said) for said in (client, dealer)]
        dealt = Channel(ends[1][0], "dealer", 1.0)
        monkeypatch.setattr("mergec.runtime.session.handshake.connect", lambda *_: dealt)
        parent = Alone()
        ServerSession(options, program, encoded, "", ends[0][0], parent, Log()).play()
        parent.close()
        return wire.heard(ends[fuzzed][1], ends[fuzzed][0])

    return {
        "client": Play(recorded.to_server, lambda said: play(said, recorded.dealer_to_server, 0)),
        "dealer": Play(recorded.dealer_to_server, lambda said: play(recorded.to_server, said, 1)),
    }


def play_dealer(recorded: Recorded, wire: Wire, monkeypatch: Any) -> dict[str, Play]:
    program = load_bundle(recorded.bundles / "dealer", "dealer")
    options = DealerSettings(Path(), NOWHERE, PLAIN["dealer"], timeout=0.2)
    requests = [frame for frame in recorded.client_to_dealer[1:] if frame[0] != Kind.ALIVE]
    line = [frame[:1] + frame[HEADER.size :] for frame in requests]

    def play(said: list[bytes]) -> list[bytes]:
        own, peer = wire.end(said)
        parent = Alone([new_seed().hex(), new_seed().hex()], line)
        DealerSession(options, program, own, parent, Log()).play()
        parent.close()
        return wire.heard(peer, own)

    return {
        "client": Play(recorded.client_to_dealer, play),
        "server": Play(recorded.server_to_dealer, play),
    }


def play_client(recorded: Recorded, wire: Wire, monkeypatch: Any) -> dict[str, Play]:
    program = load_bundle(recorded.bundles / "client", "client")

    def play(server: list[bytes], dealer: list[bytes], fuzzed: int) -> list[bytes]:
        ends = [wire.end(said) for said in (server, dealer)]
        channels = [Channel(ends[i][0], ("server", "dealer")[i], 1.0) for i in (0, 1)]
        monkeypatch.setattr("mergec.runtime.roles.peers.connect", lambda *_: channels[0])
        monkeypatch.setattr("mergec.runtime.session.handshake.connect", lambda *_: channels[1])
        connection = Connection(program, server=NOWHERE, dealer=NOWHERE, security=PLAIN["client"])
        with suppress(MergecError):
            list(connection.generate([5, 1], max_tokens=2))
            connection.close()
        return wire.heard(ends[fuzzed][1], ends[fuzzed][0])

    return {
        "server": Play(recorded.to_client, lambda said: play(said, recorded.dealer_to_client, 0)),
        "dealer": Play(recorded.dealer_to_client, lambda said: play(recorded.to_client, said, 1)),
    }


@dataclasses.dataclass
class Play:
    """What an honest peer sends to a role, and how it is mutated."""

    original: list[bytes]
    run: Callable[[list[bytes]], list[bytes]]


ROLES = {"server": play_server, "dealer": play_dealer, "client": play_client}
SAFE = {Kind.HELLO, Kind.ERROR}
"""What anybody may be told, whoever it is."""


def agrees(said: list[bytes], mine: Hello, peer: str) -> bool:
    """Whether the first frame but heartbeats is a greeting that this role has to accept."""
    try:
        told = [frame for frame in frames(b"".join(said)) if frame[0] != Kind.ALIVE]
        theirs = Hello.decode(told[0][HEADER.size :], peer)
        compare(mine, theirs, peer)
    except (PartyError, IndexError):
        return False
    return True


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fails a role that allocates what a hostile frame requests."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def resident() -> int:
    """This process's memory, without garbage."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("peer", ["client", "server", "dealer"])
@pytest.mark.parametrize("name", ROLES)
@pytest.mark.usefixtures("bounded")
def test_mutated_sessions_end_in_one_line(
    name: str, peer: str, recorded: Recorded, monkeypatch: Any, capsys: Any
) -> None:
    if name == peer:
        pytest.skip("a role does not talk to itself")
    wire = Wire()
    play = ROLES[name](recorded, wire, monkeypatch)[peer]
    mine = Hello.of(name, load_bundle(recorded.bundles / name, name).manifest)
    honest = [frame[0] for frame in play.run(play.original)]
    assert Kind.ERROR not in honest
    assert len(honest) > 1
    tried = examples = 0

    def check(said: list[bytes]) -> None:
        nonlocal tried, examples
        told = [frame[0] for frame in play.run(said)]
        tried, examples = tried + len(said), examples + 1
        assert set(told) <= set(honest) | {Kind.ERROR, Kind.REFUSED, Kind.ALIVE}
        # Rounds and blocks are as many as in the honest session, at most, and none for strangers.
        for kind in (Kind.ROUND, Kind.BLOCK, Kind.SEED, Kind.STEP):
            assert told.count(kind) <= 2 * honest.count(kind)
        if name != "client" and not agrees(said, mine, peer):
            assert set(told) <= SAFE

    began, before, threads = time.process_time(), resident(), set(threading.enumerate())
    while tried < FRAMES:
        count = min(BATCH, (FRAMES - tried) // len(play.original) + 1)

        @seed(examples)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(mutations(play.original))
        def batch(said: list[bytes]) -> None:
            check(said)

        batch()
    for thread in set(threading.enumerate()) - threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread.name} goes on"
    grown = resident() - before
    with capsys.disabled():
        if "MERGEC_FUZZ_FRAMES" in os.environ:
            sys.stdout.write(
                f"\n{name} told by a hostile {peer}: {tried} frames in {examples} sessions, "
                f"{time.process_time() - began:.0f} s of CPU, {grown / 1e6:.0f} MB more\n"
            )
    # A frame may claim all of ROOM; what a process loads at its first steps is far less.
    assert grown < ROOM // 32 + KEPT * examples
