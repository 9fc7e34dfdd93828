"""Transport: counters, streams, and errors of a missing or dead party."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from mergec.runtime.core.errors import PartyError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.session.hello import PROTOCOL_VERSION, Hello, compare
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.dealer_link import BLOCK_BYTES, FIRST_BYTES, DealerSender
from mergec.runtime.transport.lines import Lines
from mergec.runtime.transport.loopback import dealer_pair, link_pair
from mergec.runtime.transport.traffic import Traffic
from tests.roles import Script, outputs
from tests.services import wait_until

HASH = "ab" * 32


def flat(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


# ---------------------------------------------------------------------------- in one process


def test_loopback_exchange_both_ways_and_one_way() -> None:
    client, server = link_pair()
    seen: list[torch.Tensor] = []

    def serve() -> None:
        seen.append(server.exchange(flat(9), 3))
        seen.append(server.exchange(None, 2))

    thread = threading.Thread(target=serve)
    thread.start()
    assert client.exchange(flat(1, 2, 3), 1).tolist() == [9]
    assert client.exchange(flat(4, 5), 0).tolist() == []
    thread.join()
    assert [t.tolist() for t in seen] == [[1, 2, 3], [4, 5]]
    assert client.traffic == Traffic(rounds=2, sent=5, received=1)
    assert server.traffic == Traffic(rounds=2, sent=1, received=5)


def test_loopback_notices_a_wrong_length_and_a_lost_peer() -> None:
    client, server = link_pair(timeout=0.05)
    client.exchange(flat(1, 2), 0)
    with pytest.raises(PartyError, match="the client sent 2 bytes where 3 were expected"):
        server.exchange(None, 3)
    with pytest.raises(PartyError, match=r"the client sent nothing for 0\.05 s"):
        server.exchange(None, 3)
    client.close()
    with pytest.raises(PartyError, match="the client went away"):
        server.exchange(None, 3)


def test_a_message_must_be_flat_bytes() -> None:
    client, _ = link_pair()
    with pytest.raises(PartyError, match="flat uint8"):
        client.exchange(torch.zeros(3), 0)
    with pytest.raises(PartyError, match="flat uint8"):
        client.exchange(torch.zeros(3, 3, dtype=torch.uint8), 0)


def test_traffic_snapshot_difference_and_reset() -> None:
    traffic = Traffic(rounds=3, sent=10, received=20, offline_received=5)
    before = traffic.snapshot()
    traffic.rounds += 1
    traffic.sent += 7
    assert traffic - before == Traffic(rounds=1, sent=7)
    assert (before.online, before.offline) == (30, 5)
    traffic.reset()
    assert traffic == Traffic()


@pytest.mark.parametrize("large", [1000, 3000], ids=["gathered", "of its own"])
def test_streams_that_keep_pace_wait_for_no_flush(large: int) -> None:
    """The few words of one party arrive together with the many of the other."""
    (few, reader), (many, other) = (dealer_pair(block_bytes=2000, timeout=60.0) for _ in range(2))
    few.keep_pace(many)
    few.write(torch.arange(10, dtype=torch.uint8))
    for _ in range(2):
        many.write(torch.ones(large, dtype=torch.uint8))
    assert reader.read(10).tolist() == list(range(10))
    assert int(other.read(2 * large).sum()) == 2 * large
    few.write(torch.zeros(3, dtype=torch.uint8))
    many.write(torch.zeros(3, dtype=torch.uint8))
    few.flush()
    assert reader.read(3).tolist() == other.read(3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_dealer_stream_is_a_byte_stream(block: int) -> None:
    sender, receiver = dealer_pair(block_bytes=block)
    whole = torch.arange(100, dtype=torch.uint8)
    for part in whole.split(7):
        sender.write(part)
    sender.write(flat())
    sender.flush()
    read = torch.cat([receiver.read(n) for n in (0, 1, 13, 50, 0, 36)])
    assert read.equal(whole)
    assert (sender.sent, receiver.consumed, receiver.received) == (100, 100, 100)


def test_dealer_stream_reads_are_aligned_and_own_their_memory() -> None:
    sender, receiver = dealer_pair()
    sender.write(flat(*range(64)))
    sender.flush()
    read = []
    for count in (1, 16, 7, 8, 3, 13, 16):
        part = receiver.read(count)
        assert part.data_ptr() % 8 == 0
        read += part.tolist()
        part.zero_()
    assert read == list(range(64))


def test_dealer_stream_small_writes_wait_for_a_block() -> None:
    sender, receiver = dealer_pair(block_bytes=8)
    sender.write(flat(1, 2, 3))
    time.sleep(0.05)
    assert receiver.received == 0
    sender.write(flat(4, 5, 6, 7, 8))
    assert receiver.read(8).tolist() == list(range(1, 9))


class _Blocks:
    """Notes how large each block is."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, block: torch.Tensor) -> None:
        self.sizes.append(block.numel())

    def end(self) -> None:
        raise AssertionError


def test_a_steps_first_blocks_are_small_because_parties_wait_for_them() -> None:
    few, many = _Blocks(), _Blocks()
    sender, beside = DealerSender(few), DealerSender(many)
    sender.keep_pace(beside)
    count = 4 * BLOCK_BYTES // FIRST_BYTES
    for _ in range(2):
        for _ in range(count):
            sender.write(torch.zeros(1, dtype=torch.uint8))
            beside.write(torch.zeros(FIRST_BYTES, dtype=torch.uint8))
        sender.flush()
    step = [1, 2, 4, 8, 16, 32, 64, 128, 128, 128, 1]
    assert sum(step) == count
    assert few.sizes == 2 * step
    assert many.sizes == [FIRST_BYTES * size for size in few.sizes]


def test_dealer_runs_ahead_up_to_the_limit() -> None:
    sender, receiver = dealer_pair(block_bytes=10, ahead_bytes=30)

    def deal() -> None:
        for _ in range(10):
            sender.write(torch.zeros(10, dtype=torch.uint8))

    dealer = threading.Thread(target=deal)
    dealer.start()
    # In addition, the receiving thread holds one block, one is in transit, and one is in use.
    wait_until(lambda: (receiver.received, sender.sent) == (30, 60))
    time.sleep(0.05)  # more would come now
    assert (receiver.received, sender.sent) == (30, 60)
    assert receiver.read(100).numel() == 100
    dealer.join()


def test_a_dealer_that_nobody_listens_to_is_stopped() -> None:
    sender, _ = dealer_pair(block_bytes=10, ahead_bytes=10)
    stopped: list[str] = []

    def deal() -> None:
        try:
            for _ in range(10):
                sender.write(torch.zeros(10, dtype=torch.uint8))
        except PartyError as error:
            stopped.append(str(error))

    dealer = threading.Thread(target=deal)
    dealer.start()
    wait_until(lambda: sender.sent == 40)  # what the other end takes without being read
    assert dealer.is_alive()
    sender.abandon()
    dealer.join()
    assert stopped == ["the session ended while the dealer was working"]


def test_a_block_larger_than_the_limit_passes() -> None:
    sender, receiver = dealer_pair(block_bytes=4, ahead_bytes=8)
    sender.write(torch.zeros(20, dtype=torch.uint8))
    assert receiver.read(20).numel() == 20


def test_dealer_ends_before_it_should() -> None:
    sender, receiver = dealer_pair()
    sender.write(flat(1, 2))
    sender.close()
    with pytest.raises(PartyError, match="the dealer ended the session"):
        receiver.read(3)


def test_a_silent_dealer_is_named() -> None:
    _, receiver = dealer_pair(timeout=0.05)
    with pytest.raises(PartyError, match=r"the dealer sent nothing for 0\.05 s"):
        receiver.read(1)


MINE = Hello("client", "mergec", HASH)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (Hello("server", "crypten", HASH), "the server runs in mode crypten, this party in mode"),
        (Hello("server", "mergec", "cd" * 32), "the server has the program cdcdcdcdcdcd, this"),
        (Hello("client", "mergec", HASH), "was expected, but the peer says it is the"),
        (Hello("server", "mergec", HASH, fixed=14), "computes with 14 fractional bits"),
        (Hello("server", "mergec", HASH, debug=1), "different debugging options"),
        (Hello("server", "mergec", HASH, version=9), "speaks version 9 of the protocol"),
        (Hello("server", "mergec", HASH, ring=32), "computes in a ring of 32 bits"),
        (Hello("server", "mergec", HASH, ("fuse_glu:2",)), r"of other passes \(fuse_glu:2\)"),
    ],
)
def test_parties_that_disagree_are_told_in_what(theirs: Hello, message: str) -> None:
    with pytest.raises(PartyError, match=message):
        compare(MINE, Hello.decode(theirs.encode(), "server"), "server")


def test_parties_that_agree_pass() -> None:
    compare(MINE, Hello.decode(Hello("server", "mergec", HASH).encode(), "server"), "server")
    assert MINE.version == PROTOCOL_VERSION


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff", b"{}", b"[" * 9999, b'{"version": 3}', b'{"version": true}']
)
def test_a_greeting_that_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises(PartyError, match="the server sent a malformed hello"):
        Hello.decode(data, "server")


def test_addresses() -> None:
    assert Address.parse("127.0.0.1:1").loopback
    assert Address.parse("localhost:1").loopback
    assert str(Address.parse("[::1]:7")) == "[::1]:7"
    assert not Address.parse("10.0.0.7:1").loopback
    for text in ("host", "host:x", "host:70000", "tcp://host:1", "", "host:1/x"):
        with pytest.raises(PartyError, match="not of the form host:port"):
            Address.parse(text)


# ------------------------------------------------------------------------ in three processes


def test_three_processes_exchange_and_stream() -> None:
    printed = outputs(
        """
        from mergec.runtime.transport.frames import Kind
        from mergec.runtime.transport.dealer_link import (
            ChannelBlockReader, ChannelBlockWriter, DealerReceiver, DealerSender)
        big = torch.arange(3_000_000, dtype=torch.int64).view(torch.uint8)
        if role == "dealer":
            to_client, to_server = (DealerSender(ChannelBlockWriter(channels[p])) for p in (0, 1))
            for part in big.split(300_001):
                to_server.write(part)
            to_client.write(torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
            to_client.close()
            to_server.close()
            assert bytes(channels[0].receive(Kind.STEP, limit=9)) == b"more"
            print(*(channels[p].traffic.offline_sent for p in (0, 1)))
            sys.exit()
        stream = DealerReceiver(ChannelBlockReader(channels[2], 120.0), timeout=120.0)
        link = channels[1 if role == "client" else 0]
        if role == "client":
            channels[2].send(Kind.STEP, b"more")
            assert link.exchange(big[:5].clone(), 9).tolist() == list(range(9))
            assert link.exchange(None, big.numel()).equal(big)
            assert link.exchange(big, 0).numel() == 0
            assert stream.read(4).tolist() == [1, 2, 3, 4]
        else:
            assert stream.read(24_000_000).equal(big)
            assert link.exchange(torch.arange(9, dtype=torch.uint8), 5).tolist() == [0] * 5
            link.exchange(big, 0)
            assert link.exchange(None, big.numel()).equal(big)
        stream.finish()
        print(link.traffic.rounds, link.traffic.sent, link.traffic.received)
        print(stream.consumed, channels[2].traffic.offline_received)
        """
    )
    assert printed["client"] == ["3 24000005 24000009", "4 4"]
    assert printed["server"] == ["3 24000009 24000005", "24000000 24000000"]
    assert printed["dealer"] == ["4 24000000"]


def test_a_stream_that_does_not_end_is_noticed() -> None:
    _, receiver = dealer_pair(timeout=0.05)
    with pytest.raises(PartyError, match=r"the dealer sent nothing for 0\.05 s"):
        receiver.finish()
    sender, receiver = dealer_pair()
    sender.close()
    receiver.finish()


def test_a_killed_party_ends_the_others() -> None:
    script = """
        import signal
        from mergec.runtime.transport.frames import Kind
        print("here", flush=True)
        try:
            if role == "client":
                channels[1].exchange(None, 8)
            elif role == "server":
                signal.pause()
            else:
                channels[0].receive(Kind.STEP, limit=8)
        except PartyError as error:
            print(error, flush=True)
    """
    with Lines() as lines:
        running = {role: Script(role, script, lines) for role in ROLES}
    for each in running.values():
        each.wait_for("here")
    running["server"].kill()
    client, dealer = running["client"].finish(), running["dealer"].finish()
    assert "the server went away" in client.out
    assert "the client went away" in dealer.out
    assert "Traceback" not in client.err + dealer.err
