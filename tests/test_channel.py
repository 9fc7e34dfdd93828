"""Frames, TLS and certificates: what is accepted, what is rejected, and the messages."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mergec.runtime.core.errors import (
    BusyError,
    MergecError,
    PartyError,
    PeerEndedError,
    PeerStoppedError,
)
from mergec.runtime.transport import channel as channel_module
from mergec.runtime.transport import pulse as pulse_module
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.authority import make_certificates, make_request
from mergec.runtime.transport.certificates import (
    CERTIFICATE,
    KEY,
    check_certificate,
)
from mergec.runtime.transport.channel import HANDSHAKE_TIMEOUT, Channel
from mergec.runtime.transport.connect import Security, accept, connect, listen
from mergec.runtime.transport.dealer_link import (
    ChannelBlockReader,
    ChannelBlockWriter,
    DealerReceiver,
    DealerSender,
)
from mergec.runtime.transport.frames import Kind, ending, printable
from mergec.runtime.transport.pulse import Pulse
from mergec.runtime.transport.sockets import keep_alive
from mergec.runtime.transport.traffic import Traffic
from tests.handshakes import meet
from tests.roles import ROOT
from tests.services import wait_until

BIG = 3_000_001
HUGE = 50_000_000
"""Bytes that no socket takes before its peer reads."""

SIZES = [0, 1, 100_000, 7] * 25


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, ("ann", "bob"))
    return folder


def pair(timeout: float = 10.0) -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return Channel(one, "server", timeout), Channel(other, "client", timeout)


def flat(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int64).to(torch.uint8)


@pytest.fixture(params=["plain", "tls"])
def channels(request: pytest.FixtureRequest, certificates: Path) -> Iterator[tuple[Any, Any]]:
    if request.param == "plain":
        made = pair()
    else:
        client = Security("client", certificates / "ann")
        made = meet(client, Security("server", certificates))
    yield made
    for channel in made:
        channel.close()


def test_rounds_cross_both_ways_at_once_and_are_counted(channels: tuple[Any, Any]) -> None:
    client, server = channels
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(
            lambda: [server.exchange(*m) for m in ((flat(BIG), 5), (None, BIG), (flat(3), 0))]
        )
        assert client.exchange(flat(5), BIG).equal(flat(BIG))
        assert client.exchange(flat(BIG), 0).numel() == 0
        assert client.exchange(None, 3).equal(flat(3))
        first, second, third = served.result()
    assert first.equal(flat(5))
    assert second.equal(flat(BIG))
    assert third.numel() == 0
    assert client.traffic == Traffic(3, BIG + 5, BIG + 3)
    assert server.traffic == Traffic(3, BIG + 3, BIG + 5)


def test_two_large_messages_do_not_wait_for_each_other(channels: tuple[Any, Any]) -> None:
    client, server = channels
    size = 8_000_000
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(server.exchange, flat(size), size)
        assert client.exchange(flat(size), size).equal(flat(size))
        assert served.result().equal(flat(size))


def test_one_thread_receives_while_another_sends(channels: tuple[Any, Any]) -> None:
    party, dealer = channels
    stream = DealerReceiver(ChannelBlockReader(party, 10.0), timeout=10.0)
    with ThreadPoolExecutor(1) as pool:

        def deal() -> list[bytes]:
            sender = DealerSender(ChannelBlockWriter(dealer))
            for part in flat(7_000_000).split(2_000_001):
                sender.write(part)
            sender.close()
            return [bytes(dealer.receive(Kind.STEP, limit=16)) for _ in range(50)]

        dealt = pool.submit(deal)
        for number in range(50):
            party.send(Kind.STEP, struct.pack("!qq", 1, number))
        assert stream.read(7_000_000).equal(flat(7_000_000))
        assert dealt.result()[-1] == struct.pack("!qq", 1, 49)
    with pytest.raises(PartyError, match="the dealer ended the session"):
        stream.read(1)
    assert dealer.traffic.offline_sent == party.traffic.offline_received == 7_000_000


def header(kind: int, number: int, length: int) -> bytes:
    return struct.pack("!BxxxIQ", kind, number, length)


def reason(size: int) -> bytes:
    """What an ERROR frame of so many bytes says."""
    return b'{"reason": "no!"' + b" " * (size - 17) + b"}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(9, 0, 2**63), "sent 9223372036854775808 bytes where 8 were expected"),
        (header(9, 0, 7) + b"x" * 7, "sent 7 bytes where 8 were expected"),
        (header(9, 0, 9) + b"x" * 9, "sent 9 bytes where 8 were expected"),
        (header(2, 0, 2**16) + reason(2**16), "the client says: no!"),
        (header(2, 0, 2**16 + 1), "sent frame 2 where ROUND was expected"),
        (header(9, 1, 8), "sent a frame twice or out of order"),
        (header(8, 0, 8), "sent frame 8 where ROUND was expected"),
        (header(2, 0, 2**40), "sent frame 2 where ROUND was expected"),
        (header(2, 0, 2) + b"[]", "sent text that cannot be read"),
        (header(2, 0, 17) + b'{"reason": "no!"}', "the client says: no!"),
        (header(9, 0, 8) + b"xyz", "the client went away"),
        (header(20, 1, 0), "sent a frame twice or out of order"),
        (header(20, 0, 0) * 2, "sent a frame twice or out of order"),
        (header(20, 0, 1) + b"x", "sent frame 20 where ROUND was expected"),
        (header(20, 0, 0) + header(9, 1, 7) + b"x" * 7, "sent 7 bytes where 8 were expected"),
        (header(2, 0, 34) + b'{"reason": "no!", "stopped": true}', "the client says: no!"),
        (b"GET / HTTP/1.1\r\n\r\n", "sent a frame twice or out of order"),
        (b"", "the client went away"),
    ],
)
def test_what_is_not_due_ends_the_session(data: bytes, message: str) -> None:
    raw, other = socket.socketpair()
    channel = Channel(other, "client", 5.0)
    raw.sendall(data)
    raw.close()
    with pytest.raises(PartyError, match=message):
        channel.exchange(None, 8)


def test_a_frame_is_as_long_as_its_receiver_allows() -> None:
    for size in (0, 15, 16):
        one, other = pair()
        one.send(Kind.STEP, bytes(size))
        assert len(other.receive(Kind.STEP, limit=16)) == size
    one, other = pair()
    one.send(Kind.STEP, bytes(17))
    with pytest.raises(PartyError, match="sent 17 bytes where at most 16 were expected"):
        other.receive(Kind.STEP, limit=16)
    one, other = pair()
    one.send(Kind.STEP, bytes(1))
    with pytest.raises(PartyError, match="sent frame 8 where DONE or END was expected"):
        other.receive_any((Kind.DONE, Kind.END))


def test_frames_are_numbered_modulo_2_to_the_32() -> None:
    client, server = pair()
    client._sent = server._received = 2**32 - 2
    for size in range(4):
        client.beat()
        client.send(Kind.STEP, bytes(size))
        assert len(server.receive(Kind.STEP, limit=16)) == size
    assert client._sent == server._received == 6


@pytest.mark.parametrize(
    "message",
    [
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.int8),
        torch.zeros(3, dtype=torch.uint8, device="meta"),
    ],
)
def test_only_flat_bytes_of_the_cpu_are_sent(message: torch.Tensor) -> None:
    client, _ = pair()
    with pytest.raises(PartyError, match="a message must be a flat uint8 tensor on the CPU"):
        client.exchange(message, 0)
    assert client.traffic.sent == 0


def test_halves_of_an_exchange_are_counted_as_one() -> None:
    client, server = pair()
    for size in (5, 0):
        client.post(flat(size))
        server.post(flat(size + 2))
        assert client.collect(size + 2).equal(flat(size + 2))
        assert server.collect(size).equal(flat(size))
    client.post(None)
    assert server.collect(0).numel() == 0
    assert client.traffic == Traffic(2, 5, 9)
    assert server.traffic == Traffic(3, 9, 5)


def test_a_replayed_frame_is_noticed() -> None:
    raw, other = socket.socketpair()
    channel = Channel(other, "client", 5.0)
    frame = header(9, 0, 1) + b"x"
    raw.sendall(frame + frame)
    assert channel.exchange(None, 1).tolist() == [ord("x")]
    with pytest.raises(PartyError, match="twice or out of order"):
        channel.exchange(None, 1)


def test_a_silent_peer_is_named_after_the_timeout() -> None:
    client, _ = pair(0.05)
    with pytest.raises(PartyError, match=r"the server sent nothing for 0\.05 s"):
        client.exchange(None, 8)


def test_a_byte_now_and_then_is_no_progress() -> None:
    raw, other = socket.socketpair()
    channel = Channel(other, "client", 0.4)
    ended = threading.Event()
    raw.sendall(header(9, 0, 200))  # so that the client has not been silent, however slow it is

    def trickle() -> None:
        with suppress(OSError):
            for _ in range(200):
                if ended.wait(0.05):
                    return
                raw.send(b"\0")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(trickle)
        with pytest.raises(PartyError, match=r"the client sent only \d+ bytes in 0\.4 s"):
            channel.exchange(None, 200)
        ended.set()


def test_a_message_may_take_longer_than_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances before each piece: in total 144 s, where 60 s are allowed."""
    now = [0.0]
    monkeypatch.setattr(channel_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sender, receiver = pair(60.0)
    data = header(9, 0, 600_000) + bytes(600_000)

    def pieces() -> None:
        for start in range(0, len(data), 100_000):
            now[0] += 24.0
            sender._socket.setblocking(True)
            sender._socket.sendall(data[start : start + 100_000])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(pieces)
        assert receiver.exchange(None, 600_000).numel() == 600_000


class Clock:
    """Replaces the clock of channels, which then waits for frames alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(channel_module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def beat(self, one: Channel, other: Channel, step: float = 40.0) -> None:
        """A heartbeat from `one` after so many seconds; waits until `other` has taken it."""
        self.now += step
        due = one._sent + 1
        one.beat()
        wait_until(lambda: other._received == due)


def test_small_rounds_meet_whatever_else_a_peer_may_send() -> None:
    """Alone, behind a heartbeat, in two parts, two at once, and an error in their place."""
    raw, other = socket.socketpair()
    channel = Channel(other, "client", 5.0)
    raw.sendall(header(9, 0, 3) + b"one")
    assert bytes(channel.exchange(None, 3)) == b"one"
    assert channel.traffic == Traffic(1, 0, 3)
    raw.sendall(header(20, 1, 0) + header(9, 2, 3) + b"two")
    assert bytes(channel.exchange(None, 3)) == b"two"
    with ThreadPoolExecutor(1) as pool:
        raw.sendall(header(9, 3, 5) + b"th")
        reply = pool.submit(channel.exchange, None, 5)
        wait_until(lambda: channel._received == 4)  # it has the first part
        raw.sendall(b"ree")
        assert bytes(reply.result()) == b"three"
    raw.sendall(header(9, 4, 4) + b"four" + header(9, 5, 4) + b"five")
    assert [bytes(channel.exchange(None, 4)) for _ in range(2)] == [b"four", b"five"]
    assert channel.traffic == Traffic(5, 0, 19)
    assert channel._received == 6
    reason = b'{"reason": "it is late"}'
    raw.sendall(header(2, 6, len(reason)) + reason)
    with pytest.raises(PartyError, match="the client says: it is late"):
        channel.exchange(None, len(reason))  # as long as the message that is due


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_rounds_as_long_as_a_small_message(channels: tuple[Any, Any], excess: int) -> None:
    """And one byte shorter or longer, each way."""
    size = channel_module._SMALL + excess
    client, server = channels
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.exchange, flat(size), 7)
        assert client.exchange(flat(7), size).equal(flat(size))
        assert reply.result().equal(flat(7))


def test_a_heartbeat_that_does_not_count_starts_no_new_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The wait is measured from the call, not from what was read first."""
    clock = Clock(monkeypatch)
    client, server = pair(60.0)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.exchange, None, 8)
        clock.beat(server, client, 40.0)
        clock.now += 30.0
        server.beat()
        with pytest.raises(PartyError, match="is at work, but sent nothing for 70 s"):
            reply.result(20)


def test_a_peer_at_work_is_waited_for(channels: tuple[Any, Any], monkeypatch: Any) -> None:
    """Heartbeats extend the wait from 60 s to 240 s, and are no traffic."""
    clock = Clock(monkeypatch)
    client, server = channels
    client.timeout = 60.0
    client.expect(1000.0)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.exchange, flat(5), BIG)
        assert server.exchange(None, 5).equal(flat(5))
        for _ in range(6):
            clock.beat(server, client)
        server.exchange(flat(BIG), 0)
        assert reply.result().equal(flat(BIG))
    assert client.traffic == Traffic(1, 5, BIG)
    assert server.traffic == Traffic(2, BIG, 5)


@pytest.mark.parametrize(("size", "enough"), [(2**16, True), (2**16 - 2, False)])
def test_64_kib_within_the_timeout_are_progress(
    size: int, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They arrive after 40 s of 60, and then a byte after 80. With a byte less nothing moved."""
    clock = Clock(monkeypatch)
    sender, receiver = pair(60.0)
    data = header(9, 0, 2**17) + bytes(2**17)
    parts = data[:size], data[size : size + 1], data[size + 1 :]
    sender._socket.setblocking(True)
    with ThreadPoolExecutor(1) as pool, closing(sender._socket):
        reply = pool.submit(receiver.exchange, None, 2**17)
        wait_until(receiver._reading.locked)  # since when it waits is known
        for part in parts[: 3 if enough else 2]:
            clock.now = min(80.0, clock.now + 40.0)
            sender._socket.sendall(part)
            wait_until(lambda: not unread(receiver) or reply.done())
        if enough:
            assert reply.result().numel() == 2**17
        else:
            with pytest.raises(PartyError, match=r"sent only 65535 bytes in 60 s"):
                reply.result(timeout=20.0)


def unread(channel: Channel) -> int:
    """Bytes that have arrived and were not taken."""
    found = fcntl.ioctl(channel.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(found, sys.byteorder)


def test_until_when_a_peer_is_waited_for() -> None:
    """For the limit after what came last; heartbeats move that on, until the step should end."""
    channel, _ = pair()
    assert channel.deadline(10.0, 60.0) == 70.0
    channel._got = 30.0
    assert channel.deadline(10.0, 60.0) == 90.0
    assert channel.deadline(40.0, 60.0) == 100.0
    channel._alive, channel._until = 100.0, 130.0
    assert channel.deadline(10.0, 60.0) == 130.0
    channel._until = 1000.0
    assert channel.deadline(10.0, 60.0) == 160.0
    channel._until = 80.0
    assert channel.deadline(10.0, 60.0) == 90.0


def test_what_is_said_of_a_silent_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    channel, _ = pair()
    clock.now, channel._alive = 100.0, 40.5
    assert "says that it is at work, but sent nothing for 99 s" in str(channel.silent(1.0, 60.0))
    assert "sent nothing for 60 s" in str(channel.silent(40.5, 60.0))
    assert "sent only 3 bytes in 60 s" in str(channel.silent(1.0, 60.0, 3))
    channel._alive = 40.0
    assert str(channel.silent(1.0, 60.0)).startswith("the server sent nothing for 60 s; check")


def test_a_heartbeat_is_sent_after_so_many_quiet_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    client, _ = pair()
    client.send(Kind.DONE)
    clock.now = 10.0
    client.beat(10.5)
    assert client._sent == 1
    client.beat(10.0)
    assert client._sent == 2
    client.beat(0.5)
    assert client._sent == 2


@pytest.mark.parametrize(("wait", "kind"), [(0, PeerEndedError), (7, BusyError)])
def test_a_party_says_when_to_come_again(wait: int, kind: type, monkeypatch: Any) -> None:
    monkeypatch.setattr(channel_module, "_LINGER", 0.01)
    client, server = pair()
    server.fail("full", wait=wait)
    with pytest.raises(PartyError, match="the server says: full") as caught:
        client.receive_any((Kind.DONE,))
    assert type(caught.value) is kind
    assert not wait or caught.value.wait == wait


def test_a_peer_that_only_says_so_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    client, server = pair(60.0)
    client.expect(150.0)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.exchange, None, 8)
        for _ in range(4):
            clock.beat(server, client)
        with pytest.raises(PartyError, match="the server says that it is at work, but sent nothin"):
            reply.result()
    assert clock.now == 160.0


def test_heartbeats_outside_of_a_step_count_as_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    client, server = pair(60.0)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.receive_any, (Kind.STEP,))
        for _ in range(2):
            clock.beat(server, client)
        with pytest.raises(PartyError, match="the server says that it is at work, but sent nothin"):
            reply.result()
    assert clock.now == 80.0


def test_a_flood_of_heartbeats_ends_in_time() -> None:
    raw, other = socket.socketpair()
    channel = Channel(other, "client", 0.3)
    channel.expect(0.6)

    def flood() -> None:
        with suppress(OSError):
            for start in range(0, 1 << 30, 1000):
                raw.sendall(b"".join(header(20, start + n, 0) for n in range(1000)))

    with ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(flood)
        with pytest.raises(PartyError, match="the client says that it is at work, but sent"):
            channel.exchange(None, 8)
        channel.close()
        flooding.result()


def test_a_peer_that_is_slow_to_read_but_at_work_is_waited_for(
    channels: tuple[Any, Any], monkeypatch: Any
) -> None:
    """The sender reads heartbeats while its own frame waits; what else came stays in place."""
    clock = Clock(monkeypatch)
    party, dealer = channels
    dealer.timeout = 60.0
    dealer.expect(1000.0)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(dealer.send, Kind.BLOCK, bytes(HUGE))
        for _ in range(6):
            clock.beat(party, dealer)
        party.send(Kind.DONE)
        assert len(party.receive(Kind.BLOCK, limit=HUGE)) == HUGE
        sent.result()
        assert dealer.receive_any((Kind.DONE,))[0] is Kind.DONE


def test_a_peer_that_ends_is_heard_while_a_frame_waits() -> None:
    party, dealer = pair()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(dealer.send, Kind.BLOCK, bytes(HUGE))
        party.fail("it was stopped", stopped=True)
        with pytest.raises(PeerStoppedError, match="the client says: it was stopped"):
            sent.result()


def test_heartbeats_come_between_frames_of_another_thread(channels: tuple[Any, Any]) -> None:
    client, server = channels
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():
            client.beat()

    with ThreadPoolExecutor(2) as pool:
        beating = pool.submit(beat)
        sent = pool.submit(lambda: [client.send(Kind.BLOCK, bytes(size)) for size in SIZES])
        received = [len(server.receive(Kind.BLOCK, limit=BIG)) for _ in SIZES]
        sent.result()
        ended.set()
        beating.result()
    assert received == SIZES
    assert server._received > len(SIZES)


def test_a_heartbeat_into_a_full_socket_neither_waits_nor_breaks_a_frame() -> None:
    client, server = pair()
    # Each has 16 bytes of header, so that a heartbeat may fit in part.
    client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
    before = -1
    while client._sent != before:
        before = client._sent
        client.beat()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(client.send, Kind.DONE)
        assert server.receive_any((Kind.DONE,))[0] is Kind.DONE
        sent.result()
    assert server._received == client._sent == before + 1


def test_polling_shows_no_heartbeats(channels: tuple[Any, Any]) -> None:
    client, server = channels
    for _ in range(3):
        server.beat()
    server.beat(quiet=1000.0)  # it sent something less than 1,000 s ago
    wait_until(lambda: client.readable(0.01) == set() and client._received == 3)
    one, other = socket.socketpair()
    with one, other:
        other.send(b"x")
        server.beat()
        assert client.readable(5.0, one.fileno()) == {one.fileno()}
        server.send(Kind.DONE)
        wait_until(lambda: client.readable(5.0, one.fileno()) == {client.fileno(), one.fileno()})
    assert client.receive_any((Kind.DONE,))[0] is Kind.DONE
    server.close()
    assert client.readable(5.0) == {client.fileno()}


def test_a_pulse_beats_while_there_is_work_and_never_after(monkeypatch: Any) -> None:
    monkeypatch.setattr(pulse_module, "BEAT", 0.01)
    pulse, beats = Pulse(), []
    pulse.beats.append(lambda: beats.append(1))
    for _ in range(3):
        before = len(beats)
        with pulse.working(), pulse.working():
            wait_until(lambda before=before: len(beats) > before + 2)
        after = len(beats)
        threading.Event().wait(0.05)
        assert len(beats) == after
    thread = pulse._thread
    pulse.close()
    thread.join(5.0)
    assert not thread.is_alive()


def test_a_peer_says_why_it_ends_the_session_also_to_one_that_sends() -> None:
    client, server = pair()
    with ThreadPoolExecutor(1) as pool:
        failed = pool.submit(server.fail, "the disk is full\nreally\x1b[2J")
        with pytest.raises(PartyError, match=r"^the server says: the disk is full really \[2J$"):
            while True:
                client.exchange(flat(1_000_000), 0)
        client.close()
        failed.result()


@pytest.mark.parametrize("frames", [0, 1])
def test_a_party_that_ends_waits_for_its_peer_without_spinning(
    frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer has perhaps sent something, and neither reads nor closes."""
    monkeypatch.setattr(channel_module, "_LINGER", 0.1)
    client, server = pair()
    for _ in range(frames):
        server.send(Kind.DONE)
    taken, take = [], client._take
    monkeypatch.setattr(client, "_take", lambda into: taken.append(take(into)) or taken[-1])
    began = time.monotonic()
    client.fail("it was stopped")
    assert time.monotonic() - began >= 0.1
    assert sum(taken) == frames * len(header(10, 0, 0))
    assert len(taken) < 10


def test_a_thread_that_waits_for_a_frame_ends_with_its_channel(channels: tuple[Any, Any]) -> None:
    client, _ = channels
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        waiting = pool.submit(client.collect, 8)
        while not client._reading.locked():
            time.sleep(0.001)
        client.close()
        with pytest.raises(PeerEndedError):
            waiting.result()
    assert time.monotonic() - began < 5, "the timeout is 10 s"


def test_words_of_a_peer_are_safe_to_print() -> None:
    assert printable("a\x00b\u202e\n" + "c" * 1000) == "a b " + "c" * 396
    assert printable(" " * 799 + "xy") == "x", "of 800 characters"


@pytest.mark.parametrize(
    ("wait", "believed"),
    [(1, True), (86_400, True), (0, False), (-1, False), (86_401, False), (2**70, False),
     (True, False), (1.5, False), ("9", False), (None, False)],
)  # fmt: skip
def test_a_peer_may_ask_to_wait_for_up_to_a_day(wait: Any, believed: bool) -> None:
    error = ending({"reason": "full", "wait": wait}, "server")
    assert str(error) == "the server says: full"
    assert type(error) is (BusyError if believed else PeerEndedError)
    assert not isinstance(error, BusyError) or error.wait == wait


@pytest.mark.parametrize(("stopped", "kind"), [(True, PeerStoppedError), (1, PeerEndedError)])
def test_a_peer_says_that_a_person_stopped_it(stopped: Any, kind: type) -> None:
    assert type(ending({"stopped": stopped}, "server")) is kind


def test_every_kind_of_frame_has_a_number_of_its_own() -> None:
    numbers = [kind.value for kind in Kind.__members__.values()]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))


def test_nothing_is_proven_of_a_peer_without_a_certificate(certificates: Path) -> None:
    plain, _ = pair()
    assert not plain.proven
    client = Security("client", certificates / "ann")
    assert all(channel.proven for channel in meet(client, Security("server", certificates)))


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux")
@pytest.mark.parametrize(
    ("timeout", "idle", "every", "silent"),
    [(600.0, 30, 10, 600_000), (20.5, 20, 10, 20_500), (3.0, 3, 3, 3000), (0.2, 1, 1, 1000)],
)
def test_the_kernel_looks_for_a_peer_that_is_cut_off(
    timeout: float, idle: int, every: int, silent: int
) -> None:
    """First after half a minute, and three times; never later than the timeout."""
    with socket.socket() as connection:
        keep_alive(connection, timeout)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = (
            socket.TCP_NODELAY, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT,
            socket.TCP_USER_TIMEOUT,
        )  # fmt: skip
        found = [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options]
        assert found == [1, idle, every, 3, silent]


def test_limits_are_those_that_the_threat_model_states() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    assert f"a stranger's handshake and greeting within {HANDSHAKE_TIMEOUT:g} s" in text
    assert f"Takes at most {2 * channel_module._LINGER:g} s." in (Channel.fail.__doc__ or "")


def test_certificates_name_the_role_and_the_client(certificates: Path) -> None:
    server, dealer = (Security(role, certificates) for role in ("server", "dealer"))
    client, accepted = meet(Security("client", certificates / "ann"), server)
    assert (client.peer, client.name) == ("server", "server")
    assert (accepted.peer, accepted.name) == ("client", "ann")
    assert accepted._socket.version() == "TLSv1.3"
    for channel in (client, accepted):
        channel.close()
    # The dealer's certificate is valid, but neither for a client nor for a server.
    client, accepted = meet(dealer, server)
    assert "was rejected: only the client may connect here, not dealer" in str(accepted)
    with pytest.raises(PartyError, match="the server says: only the client may connect"):
        client.exchange(None, 1)
    client, _ = meet(Security("client", certificates / "bob"), dealer)
    assert "is dealer, not the server" in str(client)


def test_strangers_are_told_apart(certificates: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other", ("ann",))
    server = Security("server", certificates)
    client, accepted = meet(Security("client", tmp_path / "other" / "ann"), server)
    assert "the server has an invalid certificate" in str(client)
    assert "trusts another authority; use certificates of one `mergec certs`" in str(accepted)
    plain, other = socket.socketpair()
    plain.sendall(header(1, 0, 100) + bytes(100))
    with pytest.raises(PartyError, match="the client does not use TLS"):
        accept(other, server, ("client",), 5.0)
    plain.close()


def test_expired_certificates_and_wrong_clocks(certificates: Path) -> None:
    now = datetime.now(UTC)
    place = certificates / "server"
    assert check_certificate(place, "server", now) == ""
    assert "expires in" in check_certificate(place, "server", now + timedelta(days=355))
    with pytest.raises(MergecError, match=r"expired on .*; run `mergec certs`"):
        check_certificate(place, "server", now + timedelta(days=400))
    with pytest.raises(MergecError, match=r"is valid from .*; set the clock"):
        check_certificate(place, "server", now - timedelta(days=1))


def test_an_expired_certificate_of_a_peer_is_named_at_both_ends(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("ann",), 1, datetime.now(UTC) - timedelta(days=2))
    security = Security("server", None, plaintext=True)
    security.folder = tmp_path / "server"
    client = Security("client", None, plaintext=True)
    client.folder = tmp_path / "ann"
    connected, accepted = meet(client, security)
    assert "certificate has expired" in str(connected)
    assert "expired; run `mergec certs`, or set the clocks" in str(accepted)


def test_folders_that_will_not_do(certificates: Path, tmp_path: Path) -> None:
    with pytest.raises(MergecError, match="is for the role client, but this party is the server"):
        Security("server", certificates / "ann")
    with pytest.raises(MergecError, match="cannot be read"):
        Security("server", tmp_path)
    place = tmp_path / "server"
    make_certificates(tmp_path)
    (place / KEY).write_bytes((certificates / "server" / KEY).read_bytes())
    with pytest.raises(MergecError, match="the key does not match the certificate"):
        Security("server", tmp_path)
    (place / CERTIFICATE).write_bytes((certificates / "server" / CERTIFICATE).read_bytes())
    with pytest.raises(MergecError, match="is not signed by the authority beside it"):
        Security("server", tmp_path)
    (place / KEY).write_text("no key")
    with pytest.raises(MergecError, match="is not a private key"):
        Security("server", tmp_path)


def test_keys_are_for_their_owner_alone_and_further_clients_can_be_added(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, ("ann",))
    assert [place.name for place in made] == ["server", "dealer", "ann"]
    assert all((place / KEY).stat().st_mode & 0o077 == 0 for place in made)
    assert [place.name for place in make_certificates(tmp_path, ("ann", "bob"))] == ["bob"]
    client, server = meet(
        Security("client", tmp_path / "bob"), Security("server", tmp_path / "server")
    )
    assert (client.name, server.name) == ("server", "bob")
    (tmp_path / "bob" / KEY).chmod(0o644)
    assert "other users can read it" in check_certificate(tmp_path / "bob", "client")
    for name in ("server", "dealer", "client", "Server"):
        with pytest.raises(MergecError, match="cannot name a client, as it is the name of a role"):
            make_certificates(tmp_path, (name,))
    for name in ("", "..", ".x", "a/b", "a b", "x" * 41):
        with pytest.raises(MergecError, match="cannot name a client; use up to 40 letters"):
            make_certificates(tmp_path, (name,))
    for name in ("server", ".."):
        with pytest.raises(MergecError, match="cannot name a client"):
            make_request(tmp_path / "new", "client", name)


def test_plaintext_is_for_loopback_and_by_request(tmp_path: Path) -> None:
    with pytest.raises(MergecError, match="connections need certificates; give --certs DIR"):
        Security("server", None)
    with pytest.raises(MergecError, match="exclude each other"):
        Security("server", tmp_path, plaintext=True)
    security = Security("server", None, plaintext=True)
    with pytest.raises(MergecError, match="--plaintext is for loopback"):
        listen(Address("0.0.0.0", 0), security)
    with pytest.raises(MergecError, match="--plaintext is for loopback"):
        connect(Address("192.0.2.1", 1), "server", security, 1.0, 1.0)


def test_a_taken_port_and_a_missing_peer_are_named() -> None:
    security = Security("server", None, plaintext=True)
    with listen(Address("127.0.0.1", 0), security) as listener:
        taken = Address("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(PartyError, match=f"cannot listen at {taken} .*; choose another"):
            listen(taken, security)
    with pytest.raises(PartyError, match=f"the dealer does not answer at {taken}"):
        connect(taken, "dealer", security, 1.0, 0.0)


def test_a_stranger_that_says_nothing_does_not_stay(certificates: Path) -> None:
    one, other = socket.socketpair()
    with pytest.raises(PartyError, match="did not finish the handshake"):
        accept(other, Security("server", certificates), ("client",), 0.05)
    one.close()


def test_a_channel_polls_also_what_it_has_read_already() -> None:
    client, server = pair()
    assert client.readable(0.0) == set()
    server.send(Kind.DONE)
    server.send(Kind.END)
    assert client.readable(5.0) == {client.fileno()}
    assert client.receive_any((Kind.DONE,))[0] is Kind.DONE
    assert client.readable(0.0) == {client.fileno()}
    assert client.receive_any((Kind.DONE, Kind.END))[0] is Kind.END
    threading.Timer(0.05, server.send_json, (Kind.QUEUED,), {"position": 3}).start()
    assert client.receive_json(Kind.QUEUED, Kind.ADMITTED) == (Kind.QUEUED, {"position": 3})


def test_a_peer_that_ends_in_the_handshake_is_not_called_a_stranger(certificates: Path) -> None:
    security = Security("server", certificates)
    one, other = socket.socketpair()
    one.sendall(b"\x16\x03\x01\x02\x00")
    one.close()
    with pytest.raises(PartyError, match="the client went away in the handshake"):
        accept(other, security, ("client",), 5.0)
