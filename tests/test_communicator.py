"""CrypTen's communicator over channels: stock arithmetic over TLS, every call, hostile frames."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import ReduceOp

from mergec.runtime.core.errors import MergecError, PartyError
from mergec.runtime.crypten import compat as crypten
from mergec.runtime.transport.authority import make_certificates
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.communicator import ChannelCommunicator
from mergec.runtime.transport.frames import Kind
from tests.roles import ROOT, environment, finish, outputs

Pair = tuple[ChannelCommunicator, ChannelCommunicator]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    channels = Channel(one, "server", 10.0), Channel(other, "client", 10.0)
    yield (
        ChannelCommunicator("client", {1: channels[0]}),
        ChannelCommunicator("server", {0: channels[1]}),
    )
    for channel in channels:
        channel.close()


def both(pair: Pair, call: Any) -> tuple[Any, Any]:
    """The results of a call at client and server."""
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(call, pair[1])
        return call(pair[0]), served.result()


def mine(communicator: ChannelCommunicator) -> torch.Tensor:
    return (
        torch.tensor([[3, -5], [2**62, 1]])
        if communicator.rank
        else torch.tensor([[10, 7], [2**62, 4]])
    )


def test_every_collective_gives_what_crypten_expects(pair: Pair) -> None:
    total = mine(pair[0]) + mine(pair[1])
    for found in both(pair, lambda c: c.all_reduce(mine(c))):
        assert found.equal(total)
    for found in both(pair, lambda c: c.all_reduce(mine(c), op=ReduceOp.BXOR)):
        assert found.equal(mine(pair[0]) ^ mine(pair[1]))
    odd = torch.tensor([1, 2, 3], dtype=torch.uint8)
    for found in both(pair, lambda c: c.all_reduce([odd, mine(c)], batched=True)):
        assert found[0].equal(2 * odd)
        assert found[1].equal(total)
    at_client, at_server = both(pair, lambda c: c.reduce(mine(c), 1))
    assert at_client is None
    assert at_server.equal(total)
    expected = [mine(c) for c in pair]
    for found in both(pair, lambda c: c.all_gather(mine(c))):
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    at_client, at_server = both(pair, lambda c: c.gather(mine(c), 0))
    assert all(a.equal(b) for a, b in zip(at_client, expected, strict=True))
    assert at_server == [None]
    parts = [torch.tensor([4, 5]), torch.tensor([6, 7])]
    found = both(pair, lambda c: c.scatter(parts if c.rank == 0 else None, 0, size=(2,)))
    assert all(a.equal(b) for a, b in zip(found, parts, strict=True))
    for result in both(pair, lambda c: c.broadcast(mine(c), 1)):
        assert result.equal(mine(pair[1]))
    for results in both(pair, lambda c: c.broadcast([odd * c.rank, mine(c)], 1, batched=True)):
        assert results[0].equal(odd)
        assert results[1].equal(mine(pair[1]))
    both(pair, lambda c: c.barrier())
    at_client, _ = both(
        pair, lambda c: c.send(mine(c), 0) if c.rank else c.recv(torch.empty_like(mine(c)), 1)
    )
    assert at_client.equal(mine(pair[1]))


def test_messages_sent_without_waiting_cross_whatever_their_size(pair: Pair) -> None:
    def swap(communicator: ChannelCommunicator) -> list[torch.Tensor]:
        sizes = (3, 1_000_000, 0, 5)
        received = [torch.zeros(size, dtype=torch.int64) for size in sizes]
        peer = communicator.peer
        pending = []
        for into in received:
            pending.append(communicator.isend(torch.full_like(into, communicator.rank + 1), peer))
            pending.append(communicator.irecv(into, peer))
        for message in reversed(pending):
            message.wait()
        return received

    at_client, at_server = both(pair, swap)
    assert all((t == 2).all() for t in at_client)
    assert all((t == 1).all() for t in at_server)


def test_traffic_is_counted_once_in_the_channel(pair: Pair) -> None:
    both(pair, lambda c: c.all_reduce(mine(c)))
    for communicator in pair:
        communicator.reset_communication_stats()
    before = pair[0].traffic
    both(pair, lambda c: c.all_reduce([mine(c), mine(c)], batched=True))
    both(pair, lambda c: c.reduce(mine(c), 0))
    spent = pair[0].traffic - before
    assert (spent.rounds, spent.sent, spent.received) == (2, 64, 96)
    stats = pair[1].get_communication_stats()
    assert (stats["rounds"], stats["bytes"]) == (2, 160)
    assert stats["time"] > 0


@pytest.mark.parametrize(
    "value",
    [
        None,
        -1,
        2.5,
        "terminate",
        torch.Size([2, 3]),
        (1, "a", [None, True]),
        {"function": "additive", "args": (torch.Size([]), torch.float64), "kwargs": {"dict": 1}},
    ],
)
def test_plain_objects_cross_as_they_are(pair: Pair, value: Any) -> None:
    for found in both(pair, lambda c: c.broadcast_obj(value if c.rank == 0 else None, 0)):
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    "value", [torch.nn.ReLU(), torch.zeros(2), object, b"x", {1: 2}, [lambda: 0]]
)
def test_other_objects_are_refused_by_the_sender(pair: Pair, value: Any) -> None:
    with pytest.raises(MergecError, match="cannot be sent as an object: parties send each other"):
        pair[0].send_obj(value, 1)
    assert pair[0].traffic.sent == 0


PICKLE = b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."


@pytest.mark.parametrize(
    ("kind", "payload", "message"),
    [
        (Kind.OBJECT, PICKLE, "an object that cannot be read"),
        (Kind.OBJECT, b"[1, 2]", "an object that cannot be read"),
        (Kind.OBJECT, b'{"size": [-1, "x"]}', "an object that cannot be read"),
        (Kind.OBJECT, b'{"dtype": "torch.load"}', "an object that cannot be read"),
        (Kind.OBJECT, b'{"reduce": ["os.system"]}', "an object that cannot be read"),
        (Kind.OBJECT, b'{"size": [], "list": []}', "an object that cannot be read"),
        (Kind.OBJECT, b'{"list": [' * 6000, "an object that cannot be read"),
        (Kind.OBJECT, bytes(1 << 17), "sent 131072 bytes where at most 65536 were expected"),
        (Kind.ROUND, b"12345678", "sent frame 9 where OBJECT was expected"),
    ],
)
def test_hostile_objects_are_refused(kind: Kind, payload: bytes, message: str) -> None:
    raw, other = socket.socketpair()
    communicator = ChannelCommunicator("server", {0: Channel(other, "client", 5.0)})
    frame = struct.pack("!BxxxIQ", kind, 0, len(payload)) + payload
    raw.sendall(frame[: 1 << 16])
    with pytest.raises(PartyError, match=message):
        communicator.recv_obj(0)
    raw.close()


@pytest.mark.parametrize("length", [0, 8, 24, 2**62])
def test_a_tensor_of_another_size_is_refused_before_anything_is_allocated(length: int) -> None:
    raw, other = socket.socketpair()
    communicator = ChannelCommunicator("server", {0: Channel(other, "client", 5.0)})
    raw.sendall(struct.pack("!BxxxIQ", Kind.ROUND, 0, length))
    with pytest.raises(PartyError, match=f"the client sent {length} bytes where 16 were expected"):
        communicator.all_reduce(torch.tensor([1, 2]))
    raw.close()


def test_parties_and_operations_that_there_are_not(pair: Pair) -> None:
    for call in (
        lambda: pair[0].send(torch.zeros(1), 2),
        lambda: pair[0].isend(torch.zeros(1), 0),
        lambda: pair[0].recv_obj(7),
    ):
        with pytest.raises(MergecError, match="there is no party"):
            call()
    with pytest.raises(MergecError, match="install a ChannelCommunicator first"):
        ChannelCommunicator.initialize(0, 2)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pair[1].all_reduce, torch.ones(1))
        with pytest.raises(MergecError, match="cannot be reduced by"):
            pair[0].all_reduce(torch.ones(1), op="average")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"function": "__init__", "device": None, "args": (), "kwargs": {}}, "no such function"),
        ("hello", "string indices"),
        (
            {"function": "square", "device": "meta", "args": ((2,),), "kwargs": {}},
            "no such function or device",
        ),
        (
            {"function": "additive", "device": None, "args": ((2,), (2,), "load"), "kwargs": {}},
            "no such product",
        ),
        (
            {"function": "square", "device": None, "args": ((2**20, 2**20),), "kwargs": {}},
            "more elements than",
        ),
        (
            {"function": "additive", "device": None, "kwargs": {}}
            | {"args": ((2**20, 1), (1, 2**20), "matmul")},
            "more elements than",
        ),
        ({"function": "square", "device": None, "args": ((-1,),), "kwargs": {}}, "negative"),
    ],
)
def test_the_third_party_deals_only_what_crypten_asks_for(request_: Any, message: str) -> None:
    lines = [socket.socketpair() for _ in range(2)]
    dealer = ChannelCommunicator(
        "dealer", {rank: Channel(line[0], "client", 10.0) for rank, line in enumerate(lines)}
    )
    client = ChannelCommunicator("client", {2: Channel(lines[0][1], "dealer", 10.0)})
    dealer.install()
    try:
        client.send_obj(request_, 2)
        with pytest.raises(PartyError, match=f"requests what cannot be dealt .*{message}"):
            crypten.serve_third_party()
    finally:
        ChannelCommunicator.shutdown()


OVER_TLS = """
    import json, sys, torch
    from pathlib import Path
    from mergec.runtime.crypten import compat as crypten
    from mergec.runtime.core.spec import CLIENT, ROLES, SERVER
    from mergec.runtime.transport.address import Address
    from mergec.runtime.transport.communicator import ChannelCommunicator
    from mergec.runtime.transport.connect import Security, accept, connect, listen
    torch.set_num_threads(1)
    role, port, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    security, address = Security(role, folder), Address("127.0.0.1", port)
    if role == "server":
        with listen(address, security) as listener:
            print(listener.getsockname()[1], flush=True)
            channel = accept(listener.accept()[0], security, ("client",), 60.0)
    else:
        channel = connect(address, "server", security, 60.0, 60.0)
    assert channel._socket.version() == "TLSv1.3"
    rank = ROLES.index(role)
    communicator = ChannelCommunicator(role, {SERVER - rank: channel})
    communicator.install()
    crypten.use_provider("insecure-first-party")
    crypten.start_party()
    a, b = torch.tensor([[1.5, -2.0], [3.0, 0.25]]), torch.tensor([[2.0, 1.0], [-1.0, 4.0]])
    with crypten.quiet(), crypten.no_grad():
        x = crypten.cryptensor(a if role == "client" else torch.zeros(2, 2), src=0)
        y = crypten.cryptensor(b if role == "server" else torch.zeros(2, 2), src=1)
        told = crypten.ArithmeticSharedTensor(
            b if role == "server" else None, src=1, broadcast_size=True
        )
        before = communicator.traffic
        product = x * y
        spent = communicator.traffic - before
        found = {
            "told": told, "mul": product, "matmul": x.matmul(y), "less": x < y, "relu": x.relu(),
            "max": x.max(), "softmax": x.softmax(1), "reciprocal": (x * x + 1).reciprocal(),
        }
        print(json.dumps({name: value.get_plain_text().tolist() for name, value in found.items()}))
        print(spent.rounds, spent.sent, spent.received)
    ChannelCommunicator.shutdown()
"""


def test_stock_crypten_computes_between_two_processes_over_tls(tmp_path: Path) -> None:
    make_certificates(tmp_path)

    def begin(role: str, port: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OVER_TLS), role, port, str(tmp_path)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    server = begin("server", "0")
    assert server.stdout is not None
    client = begin("client", server.stdout.readline().strip())
    results = [finish(process) for process in (server, client)]
    assert [(result.code, result.err) for result in results] == [(0, "")] * 2
    a, b = torch.tensor([[1.5, -2.0], [3.0, 0.25]]), torch.tensor([[2.0, 1.0], [-1.0, 4.0]])
    expected = {
        "told": b,
        "mul": a * b,
        "matmul": a @ b,
        "less": (a < b).float(),
        "relu": a.relu(),
        "max": a.max(),
        "softmax": a.softmax(1),
        "reciprocal": 1 / (a * a + 1),
    }
    for result in results:
        found, spent = result.out.splitlines()
        for name, value in json.loads(found).items():
            # Approximations are CrypTen's; comparisons and products are far more accurate.
            assert torch.allclose(torch.tensor(value).float(), expected[name], atol=5e-3), name
        # Both factors are opened at once, four words each.
        assert spent == "1 64 64"


@pytest.mark.slow
def test_crypten_keeps_its_own_communicator_over_torch_distributed(tmp_path: Path) -> None:
    """For clusters that trust each other: without a ChannelCommunicator, CrypTen is unchanged."""
    code = """
        import torch
        from mergec.runtime.crypten import compat as crypten
        crypten.use_provider("insecure-first-party")
        with crypten.quiet(), crypten.no_grad():
            crypten.communicator._init(use_threads=False)
            crypten.start_party()
            x = crypten.cryptensor(torch.tensor([1.5, -2.0]), src=0)
            print((x * x).get_plain_text().tolist(), x.lt(0).get_plain_text().tolist())
        # A party that leaves while gloo's threads still serve its peer is aborted.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    """
    meeting = {"DISTRIBUTED_BACKEND": "gloo", "RENDEZVOUS": f"file://{tmp_path}/store"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=ROOT,
            env={**environment(), **meeting, "WORLD_SIZE": "2", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for result in [finish(process) for process in processes]:
        assert result.code == 0, result
        squares, negative = result.out.strip().split("] [")
        assert torch.tensor(json.loads(squares + "]")).allclose(
            torch.tensor([2.25, 4.0]), atol=1e-3
        )
        assert json.loads("[" + negative) == [0, 1]


def test_crypten_runs_with_the_dealer_as_third_party() -> None:
    printed = outputs(
        """
        from mergec.runtime.crypten import compat as crypten
        from mergec.runtime.transport.communicator import ChannelCommunicator
        communicator = ChannelCommunicator(role, channels)
        communicator.install()
        crypten.use_provider("dealer")
        if role == "dealer":
            crypten.serve_third_party()
        else:
            crypten.start_party()
            x = crypten.cryptensor(torch.tensor([[1.5, -2.0, 3.0]]), src=0)
            y = crypten.cryptensor(torch.tensor([[2.0], [4.0], [-1.0]]), src=1)
            before = communicator.traffic
            product = x.matmul(y)
            spent = communicator.traffic - before
            print(spent.rounds, spent.sent, spent.received)
            print(product.get_plain_text().tolist())
            text = product.get_plain_text(dst=0)
            print(text.tolist() if role == "client" else "nothing")
            print((communicator.traffic - before).rounds, communicator.traffic.offline)
            if role == "client":
                crypten.end_third_party()
        """,
        timeout=120.0,
    )
    # Each party sends both factors, three words each, once.
    assert printed["client"][0] == printed["server"][0] == "1 48 48"
    assert abs(float(printed["client"][1].strip("[]")) + 8) < 1e-3
    assert printed["server"][2] == "nothing"
    # From the dealer the server gets only a seed; the client also gets its share of the product.
    assert printed["server"][3] == "3 8"
    rounds, offline = map(int, printed["client"][3].split())
    assert rounds == 3
    assert offline > 16
