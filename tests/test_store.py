"""Stored randomness: what is on disk, that it is used once, and answers without a dealer."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import urllib.request
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mergec.runtime.core.errors import PartyError, PromptError
from mergec.runtime.correlations.prg import derive, new_seed
from mergec.runtime.roles import server_session
from mergec.runtime.roles.settings import ServerSettings
from mergec.runtime.session.requests import Plan
from mergec.runtime.session.stores.folder import left_below, remove_unfinished, stores_below
from mergec.runtime.session.stores.format import (
    CHUNK_BYTES,
    KEY_VARIABLE,
    Header,
    StoreError,
    new_store,
    read_key,
)
from mergec.runtime.session.stores.reader import Store
from mergec.runtime.session.stores.writer import StoreWriter
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.channel import Kind
from mergec.runtime.transport.connect import Security
from tests import decoder
from tests.services import START, deployment, role, wait_until

KEY = bytes(range(32))
PLAN = Plan(answers=3, prompt=2, tokens=5)
ENDLESS = Plan(answers=2**20, prompt=2, tokens=5)
"""Takes hours: a preparation that only a fault ends."""


def written(root: Path, answers: int = 3, blocks: tuple[bytes, ...] = (b"ab", b"c" * 3_000_000)):
    seed = new_seed()
    header = Header(new_store(), "server", "ab" * 32, answers, 2, 5)
    with StoreWriter(root, header, KEY, seed) as writer:
        for _ in range(answers):
            for block in blocks:
                writer.write(memoryview(block))
            writer.end_answer()
        writer.finish()
    return Store.open(root / header.store, KEY), seed, writer.size


def test_what_is_written_is_read_and_nothing_of_it_is_on_disk(tmp_path: Path) -> None:
    store, seed, size = written(tmp_path)
    on_disk = [file.read_bytes() for file in store.folder.iterdir()]
    assert sum(map(len, on_disk)) == size
    assert not any(seed in data or b"c" * 16 in data for data in on_disk)
    taken, corrections = store.take(1)
    assert taken == derive(seed, "answer 1")
    # Whatever ends the answer, nothing of it stays on disk.
    assert not (store.folder / "answer-000001.bin").exists()
    assert corrections.read(5).numpy().tobytes() == b"abccc"
    assert corrections.read(2_999_997).eq(ord("c")).all()
    with pytest.raises(StoreError, match="is too short for this answer"):
        corrections.read(1)
    store.close()


def test_an_answer_is_used_once_whoever_asks_and_after_a_crash(tmp_path: Path) -> None:
    store, _, _ = written(tmp_path)
    store.take(0)
    with pytest.raises(StoreError, match="answer 0 has been used"):
        Store.open(store.folder, KEY).take(0)
    with (store.folder / "used").open("ab") as journal:
        journal.write(b"\0\0\0")  # what a crash leaves of an entry
    assert Store.open(store.folder, KEY).left() == [1, 2]
    Store.open(store.folder, KEY).take(2)
    assert Store.open(store.folder, KEY).left() == [1]
    for missing in (3, -1):
        with pytest.raises(StoreError, match="does not exist"):
            store.take(missing)


def grab(folder: Path, taken) -> None:
    store = Store.open(folder, KEY)
    for answer in range(store.header.answers):
        try:
            store.take(answer)
        except StoreError:
            continue
        taken.put(answer)


def test_processes_that_race_never_get_the_same_answer(tmp_path: Path) -> None:
    store, _, _ = written(tmp_path, 40, (b"x",))
    context = multiprocessing.get_context("fork")
    taken = context.Queue()
    racers = [context.Process(target=grab, args=(store.folder, taken)) for _ in range(3)]
    for racer in racers:
        racer.start()
    found = sorted(taken.get(timeout=START) for _ in range(40))
    for racer in racers:
        racer.join(30)
    assert found == list(range(40))
    assert taken.empty()


def test_the_journal_is_on_disk_before_the_seed_is_given(tmp_path: Path, monkeypatch) -> None:
    store, _, _ = written(tmp_path)
    seen = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.fstat(fd).st_size), real(fd)))
    store.take(0)
    assert seen == [8]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write the journal \(No space left"):
        store.take(1)


@pytest.mark.parametrize("file", ["store.json", "seed.bin", "answer-000000.bin"])
def test_damage_and_wrong_keys_are_named(tmp_path: Path, file: str) -> None:
    store, _, _ = written(tmp_path)
    with pytest.raises(StoreError, match="is damaged, or encrypted under another key"):
        Store.open(store.folder, bytes(32))
    target = store.folder / file
    data = bytearray(target.read_bytes())
    data[-20] ^= 1
    target.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        Store.open(store.folder, KEY).take(0)[1].read(3_000_002)


def test_chunks_cannot_change_places(tmp_path: Path) -> None:
    store, _, _ = written(tmp_path)
    one, other = (store.folder / f"answer-00000{n}.bin" for n in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(StoreError, match="is damaged"):
        store.take(0)[1].read(1)


def test_a_full_disk_and_a_limit_leave_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    header = Header(new_store(), "server", "ab" * 32, 1, 2, 5)
    refused = pytest.raises(StoreError, match="a store may have 1000 bytes")
    with refused, StoreWriter(tmp_path, header, KEY, new_seed(), 1000) as writer:
        writer.write(memoryview(bytes(5_000_000)))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("mergec.runtime.session.stores.writer._sync_folder", no_space)
    refused = pytest.raises(StoreError, match=r"cannot be written .*; free some space")
    with refused, StoreWriter(tmp_path, header, KEY, new_seed()) as writer:
        writer.finish()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="no such store"):
        Store.open(tmp_path / "none", KEY)


def prepare_and_die(root: Path, dies: bool) -> None:
    header = Header(new_store(), "client", "ab" * 32, 1, 2, 5)
    with StoreWriter(root, header, KEY, new_seed()):
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def test_the_next_preparation_removes_what_killed_ones_left_and_no_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    running = context.Process(target=prepare_and_die, args=(tmp_path, False))
    running.start()
    try:
        wait_until(lambda: any(tmp_path.glob(".*/seed.bin")))
        (beside,) = tmp_path.iterdir()
        for _ in range(2):
            killed = context.Process(target=prepare_and_die, args=(tmp_path, True))
            killed.start()
            killed.join(30)
            assert len(list(tmp_path.iterdir())) == 2
        store, _, _ = written(tmp_path)
        assert set(tmp_path.iterdir()) == {beside, store.folder}
    finally:
        running.kill()
        running.join(30)
    assert remove_unfinished(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [store.folder]


def test_a_long_answer_goes_to_disk_as_it_comes(tmp_path: Path, monkeypatch) -> None:
    """At the end of dealing little remains to be written to disk, while the others wait."""
    monkeypatch.setattr("mergec.runtime.session.stores.writer.SYNC_BYTES", 2 * CHUNK_BYTES)
    header = Header(new_store(), "server", "ab" * 32, 1, 2, 5)
    with StoreWriter(tmp_path, header, KEY, new_seed()) as writer:
        synced: list[int] = []
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd)))
        writer.write(memoryview(bytes(7 * CHUNK_BYTES)))
        assert len(synced) == 3
        writer.write(memoryview(b"and a little"))
        writer.end_answer()
        writer.finish()
    steps = [after - before for before, after in pairwise([0, *synced[:4]])]
    assert max(steps) < 2.01 * CHUNK_BYTES
    file = tmp_path / header.store / "answer-000000.bin"
    assert synced[3] == file.stat().st_size, "whole, with what was still in a buffer"


def test_what_is_left_is_read_from_disk(tmp_path: Path) -> None:
    assert left_below(tmp_path / "none") == {}
    store, _, _ = written(tmp_path)
    written(tmp_path, 2)
    assert left_below(tmp_path) == {"": (5, 25)}
    store.take(1)
    assert left_below(tmp_path) == {"": (4, 20)}
    (store.folder / "store.json").write_text("{")
    assert left_below(tmp_path) == {"": (2, 10)}


def test_a_server_that_starts_tells_what_is_left(tmp_path: Path) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    key, root = tmp_path / "key", tmp_path / "stores"
    key.write_text(KEY.hex())
    store, _, _ = written(root)
    store.take(0)
    damaged, _, _ = written(root)
    (damaged.folder / "seed.bin").write_bytes(bytes(44))
    (root / f".{new_store()}").mkdir()
    options = ("--plaintext", "--stores", str(root), "--store-key", str(key))

    def left() -> list[float]:
        url = f"http://{server.metrics}/metrics"
        page = urllib.request.urlopen(url, timeout=START).read().decode()
        return [
            float(line.split()[1])
            for what in ("answers", "tokens")
            for line in page.splitlines()
            if line.startswith(f"mergec_server_stored_{what}{{")
        ]

    with role("serve", bundles, *options, "--metrics", "127.0.0.1:0") as server:
        assert server.wait_for("cleaned")["unfinished_stores"] == 1
        told = server.wait_for("a store that cannot be used")["reason"]
        assert told.startswith(f"{damaged.folder}/seed.bin: is damaged")
        assert server.address, "the other clients are served"
        assert left() == [5, 25]
        store.take(2)
        assert left() == [4, 20]


def no_space(_: Path) -> None:
    raise OSError(28, "No space left on device")


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "key"
    file.write_text(KEY.hex() + "\n")
    assert read_key(file) == KEY
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    assert read_key(None) == KEY
    for text in ("", "00" * 31, "xy" * 32):
        monkeypatch.setenv(KEY_VARIABLE, text)
        with pytest.raises(StoreError, match="no key of 64 hexadecimal digits"):
            read_key(None)
    with pytest.raises(StoreError, match="cannot be read"):
        read_key(tmp_path / "none")


def test_answers_from_a_store_need_no_dealer(tmp_path: Path) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    key = tmp_path / "key"
    key.write_text(KEY.hex())
    theirs = tmp_path / "server"
    options = ("--stores", str(theirs), "--store-key", str(key), "--timeout", "20")
    with deployment(bundles, serve=options) as made:

        def kill(*_: int) -> None:
            for worker in made.server.workers:
                worker.kill()

        # A preparation that is killed leaves no half of a store, and does not stop the next one.
        with pytest.raises(PartyError, match="the server went away"):
            made.connection().prepare(ENDLESS, tmp_path / "client", KEY, kill)
        assert stores_below(tmp_path / "client") == []
        assert stores_below(theirs) == []
        assert len(list(theirs.iterdir())) == 1, "which the next one removes"
        seen: list[tuple[int, int]] = []
        place, size = made.connection().prepare(
            PLAN, tmp_path / "client", KEY, lambda *progress: seen.append(progress)
        )
        assert seen == sorted(seen)
        assert {1, 2, 3} <= {done for done, _ in seen} <= {0, 1, 2, 3}
        (other,) = stores_below(theirs)
        assert other.name == place.name
        assert size == sum(f.stat().st_size for part in (place, other) for f in part.iterdir())
        # A full disk ends the preparation, at both ends in one line, and leaves nothing behind.
        server = psutil.Process(made.server.process.pid)
        server.rlimit(psutil.RLIMIT_FSIZE, (len(made.server.output), resource.RLIM_INFINITY))
        with pytest.raises(PartyError, match="the server says: the server cannot store that much"):
            made.connection().prepare(PLAN, tmp_path / "client", KEY)
        server.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wait_until(lambda: not made.server.workers)
        assert [file.name for file in theirs.iterdir()] == [place.name]
        made.dealer.end()

        def ask(prompt: list[int], count: int) -> list[int]:
            store = Store.open(place, KEY)
            with made.connection(dealer=None, store=store) as connection:
                return [t.token for t in connection.generate(prompt, max_tokens=count)]

        # A prompt longer than the first step, one of just its length, and one that is too short.
        assert ask([5, 1, 7, 2], 4) == decoder.plaintext(bundles, [5, 1, 7, 2], 4)
        with pytest.raises(PromptError, match="takes a prompt of at least 2 tokens"):
            ask([5], 2)
        with pytest.raises(PromptError, match="has room for 4 more after this one of 4"):
            ask([5, 1, 7, 2], 5)
        assert (Store.open(place, KEY).left(), Store.open(other, KEY).left()) == ([1, 2], [1, 2])
        # A client that crashed when only the server had noted an answer goes on with the next.
        Store.open(other, KEY).take(1)
        assert ask([5, 1], 6) == decoder.plaintext(bundles, [5, 1], 6)
        with pytest.raises(PromptError, match="is used up; run `mergec prepare` again"):
            ask([5, 1], 2)
        (other / "store.json").rename(other / "gone")
        with pytest.raises(PartyError, match="the server says: it cannot go on; see its log"):
            ask([5, 1], 2)
        assert "no such store" in made.server.output


def test_a_long_preparation_shows_signs_of_life(tmp_path: Path, monkeypatch) -> None:
    """Dealing one answer may take longer than the client waits for a message."""
    now = iter(range(100))
    monkeypatch.setattr(
        "mergec.runtime.roles.server_session.time.monotonic", lambda: 0.6 * next(now)
    )
    program = decoder.program("server")
    program.manifest = replace(program.manifest, program_hash="ab")
    settings = ServerSettings(
        tmp_path, Address("127.0.0.1", 0), Security("server", None, plaintext=True), None,
        stores=tmp_path / "stores", store_key=KEY,
    )  # fmt: skip
    said: list[tuple[Kind, dict[str, Any]]] = []
    dealt = iter([(Kind.BLOCK, memoryview(bytes(100)))] * 8 + [(Kind.MARK, memoryview(b""))])
    plan = {"answers": 1, "prompt": 2, "tokens": 3}
    channel = SimpleNamespace(
        name="ann", receive_any=lambda _: (Kind.PLAN, b""), receive=lambda *_, **__: b"",
        object=lambda _: plan,
        send_json=lambda kind, **fields: said.append((kind, fields)),
    )  # fmt: skip
    dealer = SimpleNamespace(
        receive_any=lambda *_: next(dealt), send=lambda *_: None, close=lambda: None
    )
    parent, log = (
        SimpleNamespace(tell=lambda **_: None),
        SimpleNamespace(info=lambda *_, **__: None),
    )
    session = server_session.ServerSession(settings, program, {}, "cd", None, parent, log)
    session._prepare(channel, (dealer, bytes(32)))
    progress = [fields["answers"] for kind, fields in said if kind is Kind.STORED]
    assert progress == [0, 0, 0, 0, 1]
    assert said[-1][0] is Kind.DONE
