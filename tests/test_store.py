"""Stored randomness: what is on disk, that it is used once, and answers without a dealer."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import stat
import urllib.request
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from cryptography.exceptions import InvalidTag

from mergec.runtime.cli.options import SessionOptions
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import PartyError, PromptError
from mergec.runtime.correlations.prg import derive, new_seed
from mergec.runtime.roles import dealer_session, server_session
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.dealer_session import DealerSession
from mergec.runtime.roles.settings import DealerSettings, ServerSettings
from mergec.runtime.session.handshake import Origin
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.requests import Plan, Schedule
from mergec.runtime.session.stores.folder import left_below, remove_unfinished, stores_below
from mergec.runtime.session.stores.format import (
    CHUNK_BYTES,
    KEY_VARIABLE,
    Header,
    StoreError,
    new_store,
    read_key,
    unsealed,
)
from mergec.runtime.session.stores.journal import Head, read_tag
from mergec.runtime.session.stores.keys import KeyFile
from mergec.runtime.session.stores.reader import Store
from mergec.runtime.session.stores.writer import StoreWriter
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security
from mergec.runtime.transport.frames import Kind
from mergec.runtime.transport.traffic import Traffic
from tests import decoder, session
from tests.services import START, deployment, role, wait_until

KEY, STATIC = bytes(range(32)), bytes(range(32, 64))
PLAN = Plan(answers=3, prompt=2, tokens=5)
ENDLESS = Plan(answers=2**20, prompt=2, tokens=5)
"""Takes hours: a preparation that only a fault ends."""


TAG, OTHER = bytes(16), bytes(range(16))
"""Tags of two sessions."""


def header_of(role: str = "server", answers: int = 1, store: str = "") -> Header:
    return Header(store or new_store(), role, "ab" * 32, answers, 2, 5, "cd" * 16)


def written(
    root: Path,
    answers: int = 3,
    blocks: tuple[bytes, ...] = (b"ab", b"c" * 3_000_000),
    header: Header | None = None,
):
    seed = new_seed()
    header = header or header_of(answers=answers)
    with StoreWriter(root, header, KEY, seed, STATIC) as writer:
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
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700, "for its owner alone"
    secrets = (seed, STATIC, derive(seed, "answer 0"), b"c" * 16)
    assert not any(secret in data for data in on_disk for secret in secrets)
    assert store.static == STATIC
    head, taken, corrections = store.take(TAG)
    assert (head, taken) == (store.journal().head, derive(seed, "answer 0"))
    # Whatever ends the answer, nothing of it stays in the folder.
    assert not (store.folder / "answer-000000.bin").exists()
    assert corrections.read(5).numpy().tobytes() == b"abccc"
    assert corrections.read(2_999_997).eq(ord("c")).all()
    with pytest.raises(StoreError, match="is too short for this answer"):
        corrections.read(1)
    store.close()


def test_an_answer_is_used_once_whoever_asks_and_after_a_crash(tmp_path: Path) -> None:
    store, seed, _ = written(tmp_path)
    other = Store.open(store.folder, KEY)
    taken = [who.take(TAG)[1] for who in (store, other, store)]
    assert taken == [derive(seed, f"answer {n}") for n in range(3)]
    assert store.left() == other.left() == 0
    for who in (store, other):
        with pytest.raises(StoreError, match="is used up; run `mergec prepare` again"):
            who.take(TAG)


def crash(monkeypatch, after: int) -> None:
    """From now on, the process ends after that many flushes to disk."""
    left = iter(range(after))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("after", range(5))
def test_a_crash_at_any_flush_loses_one_answer_at_most(
    tmp_path: Path, monkeypatch, after: int
) -> None:
    """Flushes of journal, new key, old key and folder; and one more than there are."""
    store, seed, _ = written(tmp_path, 3, (b"x",))
    store.take(TAG)
    with monkeypatch.context() as patch:
        crash(patch, after)
        if after < 4:
            with pytest.raises(KeyboardInterrupt):
                store.take(OTHER)
        else:
            store.take(OTHER)
    again = Store.open(store.folder, KEY)
    # What had not been flushed may still be there: the process ended, not the machine.
    assert again.left() == 1
    head, taken, corrections = again.take(TAG)
    assert (head.used, taken) == (3, derive(seed, "answer 2"))
    assert corrections.read(1).tolist() == [ord("x")]
    assert not any(file.name.startswith("answer-00000") for file in again.folder.iterdir()) or (
        # After a crash before the file was opened its contents stay, without a key.
        [file.name for file in again.folder.glob("answer-*")] == ["answer-000001.bin"]
    )


@pytest.mark.parametrize("cut", [1, 8, 55])
@pytest.mark.parametrize("filled", [False, True])
def test_an_entry_that_a_crash_left_incomplete_does_not_count(
    tmp_path: Path, cut: int, filled: bool
) -> None:
    """Cut off, or of full length with zeros, as some file systems leave it."""
    store, seed, _ = written(tmp_path, 3, (b"x",))
    store.take(TAG)
    journal = store.folder / "journal"
    entry = journal.read_bytes()
    journal.write_bytes(entry + entry[:cut].ljust(len(entry) if filled else cut, b"\0"))
    again = Store.open(store.folder, KEY)
    assert again.left() == 2
    head, taken, _ = again.take(OTHER)
    assert (head.used, taken) == (2, derive(seed, "answer 1"))
    assert journal.stat().st_size == 2 * len(entry)
    assert Store.open(store.folder, KEY).journal().head == head


def grab(folder: Path, taken) -> None:
    store = Store.open(folder, KEY)
    while True:
        try:
            taken.put(store.take(TAG)[1])
        except StoreError:
            return


def test_processes_that_race_never_get_the_same_answer(tmp_path: Path) -> None:
    store, seed, _ = written(tmp_path, 40, (b"x",))
    context = multiprocessing.get_context("fork")
    taken = context.Queue()
    racers = [context.Process(target=grab, args=(store.folder, taken)) for _ in range(3)]
    for racer in racers:
        racer.start()
    found = {taken.get(timeout=START) for _ in range(40)}
    for racer in racers:
        racer.join(30)
    assert found == {derive(seed, f"answer {n}") for n in range(40)}
    assert taken.empty()


def test_one_session_holds_a_store(tmp_path: Path) -> None:
    store, _, _ = written(tmp_path, 2, (b"x",))
    store.hold()
    with pytest.raises(StoreError, match="is in use by another session of this client"):
        Store.open(store.folder, KEY).hold()
    store.take(TAG)
    store.release()
    Store.open(store.folder, KEY).hold()


def test_journal_and_keys_are_on_disk_before_the_seed_is_given(tmp_path: Path, monkeypatch) -> None:
    """And so are the names of files, when a store is made and when an answer is removed."""
    seen: list[str] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    store, _, _ = written(tmp_path / "new" / "stores", 1, (b"x",))
    made = ["new", tmp_path.name] if seen[0] == "new" else [tmp_path.name, "new"]
    assert seen[:2] == made
    unfinished = f".{store.folder.name}"
    files = ["store.json", "static.bin", "keys.bin", "journal", "answer-000000.bin"]
    assert seen[2:] == [*files, unfinished, "stores"]
    seen.clear()
    store.take(TAG)
    assert seen == ["journal", "keys.bin", "keys.bin", store.folder.name]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    store, _, _ = written(tmp_path, 1, (b"x",))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write the journal \(No space left"):
        store.take(TAG)


# ------------------------------------------------------------------------- forward secrecy


def test_what_stays_cannot_decrypt_an_answer_that_was_used(tmp_path: Path) -> None:
    """With the key, and a copy of the encrypted answer from before: its key is gone."""
    store, seed, _ = written(tmp_path, 3, (b"x" * 99,))
    kept = (store.folder / "answer-000000.bin").read_bytes()
    keys = (store.folder / "keys.bin").read_bytes()
    store.take(TAG)
    after = (store.folder / "keys.bin").read_bytes()
    slot = len(keys) // 2
    assert after[:slot] == bytes(slot), "overwritten"
    (store.folder / "answer-000000.bin").write_bytes(kept)
    own = derive(KEY, f"store {store.header.store} server")
    context = (store.folder / "store.json").read_bytes()
    held = KeyFile(store.folder, own, context).read()
    assert held.answer == 1
    reachable = [held.own, held.secret, own, KEY, STATIC]
    for purpose in ("answer", "next", "answer 0", "answers", "journal"):
        reachable += [derive(key, purpose) for key in reachable[:5]]
    first = kept[4 : 4 + 32 + 16]
    """The first chunk: the seed, with its authentication."""
    for key in reachable:
        with pytest.raises(InvalidTag):
            unsealed(key, 0, first, b"")
    # The key from before can.
    (store.folder / "keys.bin").write_bytes(keys)
    before = KeyFile(store.folder, own, context).read()
    assert unsealed(before.own, 0, first, b"") == derive(seed, "answer 0")


def test_a_key_that_a_crash_left_is_erased_with_the_next_answer(
    tmp_path: Path, monkeypatch
) -> None:
    store, _, _ = written(tmp_path, 3, (b"x",))
    file = store.folder / "keys.bin"
    old = file.read_bytes()[:4096]
    with monkeypatch.context() as patch:
        crash(patch, 1)  # between the new key and the erasure of the old one
        with pytest.raises(KeyboardInterrupt):
            store.take(TAG)
    assert old in file.read_bytes()
    Store.open(store.folder, KEY).take(TAG)
    assert old not in file.read_bytes()


# -------------------------------------------------------- changed, restored and copied parts


def test_a_journal_that_was_changed_is_refused(tmp_path: Path) -> None:
    store, _, _ = written(tmp_path, 4, (b"x",))
    for _ in range(3):
        store.take(TAG)
    journal = store.folder / "journal"
    data = journal.read_bytes()
    size = len(data) // 3
    other, _, _ = written(tmp_path, 4, (b"x",))
    for _ in range(3):
        other.take(TAG)
    forged = {
        "a bit": bytes([data[0] ^ 1]) + data[1:],
        "the tag": data[:8] + bytes([data[8] ^ 1]) + data[9:],
        "the last MAC": data[:-1] + bytes([data[-1] ^ 1]),
        "order": data[size : 2 * size] + data[:size] + data[2 * size :],
        "the end is missing": data[: 2 * size],
        "all is missing": b"",
        "one is missing": data[:size] + data[2 * size :],
        "another store's": (other.folder / "journal").read_bytes(),
    }
    for what, content in forged.items():
        journal.write_bytes(content)
        with pytest.raises(StoreError, match="was changed") as told:
            Store.open(store.folder, KEY)
        assert "mergec prepare" in str(told.value), what
    journal.unlink()
    with pytest.raises(StoreError, match="journal: is missing; run `mergec prepare` again"):
        Store.open(store.folder, KEY)


def test_keys_that_were_restored_alone_are_refused(tmp_path: Path) -> None:
    store, _, _ = written(tmp_path, 4, (b"x",))
    old = (store.folder / "keys.bin").read_bytes()
    for _ in range(2):
        store.take(TAG)
    (store.folder / "keys.bin").write_bytes(old)
    with pytest.raises(StoreError, match="journal and keys do not belong together"):
        Store.open(store.folder, KEY)
    (store.folder / "keys.bin").write_bytes(bytes(8192))
    with pytest.raises(StoreError, match="is damaged, or encrypted under another key"):
        Store.open(store.folder, KEY)


def pair(root: Path, answers: int = 6) -> tuple[Store, Store]:
    """The client's and the server's part of a store."""
    number = new_store()
    made = [
        written(
            root / role, header=header_of(role, answers, number), blocks=(b"x",), answers=answers
        )
        for role in ("client", "server")
    ]
    return made[0][0], made[1][0]


def opened(client: Store, server: Store) -> bool:
    """What the two do when a session opens; whether the server skipped an answer."""
    journal = client.journal()
    skipped = server.follow(journal.head, journal.tag)
    assert client.journal().head == server.journal().head
    return skipped


def test_parties_agree_whoever_crashed(tmp_path: Path) -> None:
    client, server = pair(tmp_path)
    assert not opened(client, server)
    for tag in (TAG, OTHER):
        assert client.take(tag)[0] == server.take(tag)[0]
    assert not opened(client, server)
    # The client has entered an answer that the server never heard of: both go on with the next.
    client.take(OTHER)
    assert opened(client, server)
    assert not (server.folder / "answer-000002.bin").exists()
    assert client.left() == server.left() == 3
    assert client.take(TAG)[0] == server.take(TAG)[0]
    # The last answer, too.
    client.take(TAG), server.take(TAG)
    client.take(TAG)
    assert opened(client, server)
    assert client.left() == server.left() == 0


@pytest.mark.parametrize("restored", ["client", "server"])
def test_a_part_that_was_restored_is_noticed(tmp_path: Path, restored: str) -> None:
    client, server = pair(tmp_path)
    client.take(TAG), server.take(TAG)
    place = (client if restored == "client" else server).folder
    shutil.copytree(place, tmp_path / "backup")
    for _ in range(2):
        client.take(TAG), server.take(TAG)
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "backup", place)
    client, server = (Store.open(part.folder, KEY) for part in (client, server))
    used = (1, 3) if restored == "client" else (3, 1)
    told = f"the client has used {used[0]} answers of it, the server {used[1]}; one part was rest"
    with pytest.raises(PartyError, match=told):
        opened(client, server)
    assert (6 - client.left(), 6 - server.left()) == used, "nothing was used up"


def test_a_copy_that_went_its_own_way_is_noticed(tmp_path: Path) -> None:
    """The original and the copy have used as many answers, in other sessions."""
    client, server = pair(tmp_path)
    shutil.copytree(client.folder, tmp_path / "copy" / client.folder.name)
    copy = Store.open(tmp_path / "copy" / client.folder.name, KEY)
    client.take(TAG), server.take(TAG)
    with pytest.raises(PartyError, match="the client has used 0 answers of it, the server 1"):
        opened(copy, server)
    copy.take(OTHER)
    with pytest.raises(PartyError, match="they have used other answers"):
        opened(copy, server)
    with pytest.raises(PartyError, match="the client has used 2 answers of it, the server 1; one"):
        server.take(TAG, copy.journal().head.after(TAG))
    assert server.left() == 5, "and nothing was used up"
    copy.take(OTHER)  # one ahead, but of another history
    with pytest.raises(PartyError, match="the client has used 2 answers of it, the server 1"):
        opened(copy, server)
    assert not opened(client, server)


def test_heads_that_peers_send_are_checked() -> None:
    head = Head(3, bytes(32))
    assert Head.read(head.fields(), "client") == head
    for wrong in (
        None, {}, {"used": 3}, {"used": True, "chain": "00" * 32}, {"used": -1, "chain": "00" * 32},
        {"used": 3, "chain": "00" * 31}, {"used": 3, "chain": "zz" * 32}, {"used": 3, "chain": 5},
    ):  # fmt: skip
        with pytest.raises(PartyError, match="the client does not say what it has used"):
            Head.read(wrong, "client")
    for wrong in (None, "", "00", 5):
        with pytest.raises(PartyError, match="the client names no session"):
            read_tag(wrong, "client")


def test_stores_of_another_version_are_refused_and_do_not_hide_others(
    tmp_path: Path, monkeypatch
) -> None:
    old = tmp_path / "00000000000000000000000000000000"
    old.mkdir()
    former = {
        "store": old.name, "role": "client", "program": "ab" * 32, "answers": 3, "prompt": 2,
        "tokens": 5, "client": "", "weights": "", "format": 1,
    }  # fmt: skip
    (old / "store.json").write_text(json.dumps(former))
    told = "store.json: is damaged or of another version; run `mergec prepare` again"
    with pytest.raises(StoreError, match=told):
        Store.open(old, KEY)
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    options = SessionOptions(bundle=tmp_path, store=tmp_path)
    with pytest.raises(StoreError, match=told):
        options._opened_store()
    store, _, _ = written(tmp_path, 1, (b"x",))
    assert options._opened_store().folder == store.folder


@pytest.mark.parametrize("file", ["store.json", "static.bin", "answer-000000.bin"])
def test_damage_and_wrong_keys_are_named(tmp_path: Path, file: str) -> None:
    store, _, _ = written(tmp_path)
    with pytest.raises(StoreError, match="is damaged, or encrypted under another key"):
        Store.open(store.folder, bytes(32))
    target = store.folder / file
    data = bytearray(target.read_bytes())
    data[-20] ^= 1
    target.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        Store.open(store.folder, KEY).take(TAG)[2].read(3_000_002)


def test_chunks_cannot_change_places(tmp_path: Path) -> None:
    store, _, _ = written(tmp_path)
    one, other = (store.folder / f"answer-00000{n}.bin" for n in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(StoreError, match="is damaged"):
        store.take(TAG)[2].read(1)


def test_a_full_disk_and_a_limit_leave_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    header = header_of()
    refused = pytest.raises(StoreError, match="a store may have 1000 bytes")
    with refused, StoreWriter(tmp_path, header, KEY, new_seed(), STATIC, 1000) as writer:
        writer.write(memoryview(bytes(5_000_000)))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("mergec.runtime.session.stores.writer.sync_folder", no_space)
    refused = pytest.raises(StoreError, match=r"cannot be written .*; free some space")
    with refused, StoreWriter(tmp_path, header, KEY, new_seed(), STATIC) as writer:
        writer.finish()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="no such store"):
        Store.open(tmp_path / "none", KEY)


def prepare_and_die(root: Path, dies: bool) -> None:
    header = header_of("client")
    with StoreWriter(root, header, KEY, new_seed(), STATIC):
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def test_the_next_preparation_removes_what_killed_ones_left_and_no_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    running = context.Process(target=prepare_and_die, args=(tmp_path, False))
    running.start()
    try:
        wait_until(lambda: any(tmp_path.glob(".*/journal")))
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
    header = header_of()
    with StoreWriter(tmp_path, header, KEY, new_seed(), STATIC) as writer:
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
    store.take(TAG)
    assert left_below(tmp_path) == {"": (4, 20)}
    (store.folder / "store.json").write_text("{")
    assert left_below(tmp_path) == {"": (2, 10)}


def test_a_server_that_starts_tells_what_is_left(tmp_path: Path) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    key, root = tmp_path / "key", tmp_path / "stores"
    key.write_text(KEY.hex())
    store, _, _ = written(root)
    store.take(TAG)
    damaged, _, _ = written(root)
    (damaged.folder / "static.bin").write_bytes(bytes(44))
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
        assert told.startswith(f"{damaged.folder}/static.bin: is damaged")
        assert server.address, "the other clients are served"
        assert left() == [5, 25]
        store.take(TAG)
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


def test_answers_that_the_server_does_not_allow_are_not_stored(tmp_path: Path) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    key = tmp_path / "key"
    key.write_text(KEY.hex())
    options = ("--stores", str(tmp_path / "server"), "--store-key", str(key), "--tokens", "2")
    with (
        deployment(bundles, serve=options) as made,
        pytest.raises(PartyError, match="stores no such answers: an answer may have 2 tokens"),
    ):
        made.connection().prepare(Plan(1, 4, 3), tmp_path / "client", KEY)
    assert stores_below(tmp_path / "client") == []


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
        assert (Store.open(place, KEY).left(), Store.open(other, KEY).left()) == (2, 2)
        # A client that crashed before the server had noted an answer goes on with the next.
        Store.open(place, KEY).take(TAG)
        assert ask([5, 1], 6) == decoder.plaintext(bundles, [5, 1], 6)
        with pytest.raises(PromptError, match="is used up; run `mergec prepare` again"):
            ask([5, 1], 2)
        (other / "store.json").rename(other / "gone")
        with pytest.raises(PartyError, match="the server says: it cannot go on; see its log"):
            ask([5, 1], 2)
        assert "no such store" in made.server.output


def test_peers_that_do_not_keep_to_the_plan_or_the_journal_are_refused(
    tmp_path: Path, monkeypatch
) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    key = tmp_path / "key"
    key.write_text(KEY.hex())
    options = ("--stores", str(tmp_path / "server"), "--store-key", str(key), "--timeout", "20")
    with deployment(bundles, serve=options) as made:
        place, _ = made.connection().prepare(Plan(6, 4, 3), tmp_path / "client", KEY)
        made.dealer.end()
        (other,) = stores_below(tmp_path / "server")

        def ask(store: Store, prompt: list[int]) -> list[int]:
            with made.connection(dealer=None, store=store) as connection:
                return [t.token for t in connection.generate(prompt, max_tokens=3)]

        shutil.copytree(place, tmp_path / "copy" / place.name)
        prompt = [5, 1, 7, 2]
        assert ask(Store.open(place, KEY), prompt) == decoder.plaintext(bundles, prompt, 3)
        # Its first step takes one token, where four were dealt for. The server's first message
        # after that is the refusal, so it has sent nothing of that step.
        hostile = Store.open(place, KEY)
        hostile.header = replace(hostile.header, prompt=1, tokens=6)
        monkeypatch.setattr(Header, "common", Store.open(place, KEY).header.common)
        with monkeypatch.context() as patch:
            patch.setattr(Schedule, "check", lambda *_, **__: (0, []))
            told = "the server says: the client requests 1 tokens after 0, but the store holds rand"
            with pytest.raises(PartyError, match=told):
                ask(hostile, prompt)
        monkeypatch.undo()
        assert "1 tokens after 0, but the store holds randomness for 4 tokens" in made.server.output
        assert (Store.open(place, KEY).left(), Store.open(other, KEY).left()) == (4, 4)
        # The client's part from a backup: the server notices, and nothing is used.
        told = "the server says: the two parts of store .*: the client has used 0 answers of it, t"
        with pytest.raises(PartyError, match=told):
            ask(Store.open(tmp_path / "copy" / place.name, KEY), prompt)
        assert "one part was restored from a backup or copied" in made.server.output
        # A server that does not check: the client does.
        store = Store.open(place, KEY)
        with monkeypatch.context() as patch:
            patch.setattr(Head, "read", lambda *_: Head(1, bytes(32)))
            with pytest.raises(PartyError, match="the client has used 2 answers of it, the server"):
                ask(store, prompt)
        assert ask(store, prompt) == decoder.plaintext(bundles, prompt, 3), "nobody is locked out"
        # The dealer's salt is that of the session in which the store was dealt.
        with made.connection(dealer=None, store=store) as connection:
            assert connection._session.steps._executor.context.salt == store.salt
            with pytest.raises(StoreError, match="is in use by another session of this client"):
                ask(Store.open(place, KEY), prompt)


def deal(tmp_path: Path, monkeypatch, plans: int) -> list[Kind]:
    """What the dealer's process sends a server that requests a plan of two answers so often."""
    requests = iter([(Kind.PLAN, memoryview(b""))] * plans + [(Kind.END, memoryview(b""))])
    monkeypatch.setattr(dealer_session, "tell", lambda *_: None)
    settings = DealerSettings(
        tmp_path, Address("127.0.0.1", 0), Security("dealer", None, plaintext=True)
    )
    parent = SimpleNamespace(tell=lambda **_: None, check=lambda: None)
    session = DealerSession(settings, decoder.program("dealer"), None, parent, None)
    session._agreed = lambda *_: next(requests)
    said: list[Kind] = []
    channel = SimpleNamespace(
        object=lambda _: Plan(2, 2, 1).fields(), peer="server", traffic=Traffic(),
        send=lambda kind, *_: said.append(kind), expect=lambda _: None, beat=lambda _: None,
    )  # fmt: skip
    origins = [Origin(new_seed(), bytes(16)) for _ in range(2)]
    line, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with line, other:
        session._deal(channel, line, *origins, None)
    return said


def test_the_dealer_deals_for_one_plan_in_a_session(tmp_path: Path, monkeypatch) -> None:
    """The seeds of answers follow from the session's, so a second plan would repeat the masks."""
    said = deal(tmp_path, monkeypatch, 1)
    assert said.count(Kind.MARK) == 2
    assert set(said) == {Kind.BLOCK, Kind.MARK}
    with pytest.raises(PartyError, match="a session deals for one plan; start another session"):
        deal(tmp_path, monkeypatch, 2)


def test_a_program_without_a_cache_cannot_be_prepared(tmp_path: Path, monkeypatch) -> None:
    """Its later steps take all tokens again, which the plan does not foresee."""
    monkeypatch.setattr(MergecSession, "cached", False)
    with pytest.raises(PartyError, match="answers of this program cannot be precomputed"):
        deal(tmp_path, monkeypatch, 1)


def test_a_program_that_resends_cannot_be_prepared(tmp_path: Path) -> None:
    """Its last step is as long as the answer is, which no plan foresees."""
    _, program = session.compiled("gpt2", preset="merge-er")
    nowhere, security = Address("127.0.0.1", 1), Security("client", None, plaintext=True)
    connection = Connection(
        program.roles["client"], server=nowhere, dealer=nowhere, security=security
    )
    with pytest.raises(PromptError, match="resends its hidden state cannot be precomputed"):
        connection.prepare(Plan(1, 3, 3), tmp_path, b"k" * 32)


def test_a_schedule_takes_the_steps_of_its_plan_once_and_in_order() -> None:
    due = [(4, 0), (1, 4), (1, 5)]
    assert Plan(1, 4, 2).steps() == due
    whole = Plan(1, 4, 2).schedule()
    for step in due:
        whole.check(*step, Draw(7), "client")
    with pytest.raises(
        PartyError, match=r"1 tokens after 6, but .* randomness for no further step"
    ):
        whole.check(1, 6, Draw(), "client")
    for steps in ([(4, 0), (4, 0)], [(1, 4)], [(4, 0), (1, 5)], [(5, 0)], [(4, 0), (1, 4), (1, 4)]):
        schedule = Plan(1, 4, 2).schedule()
        for step in steps[:-1]:
            schedule.check(*step, Draw(), "client")
        with pytest.raises(PartyError, match="keep to the plan that it was prepared for"):
            schedule.check(*steps[-1], Draw(), "client")
    with pytest.raises(PartyError, match="requests 4 tokens after 0 with top-k 2, but"):
        Plan(1, 4, 2).schedule().check(4, 0, Draw(1, 2), "client")


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
    session._prepare(channel, (dealer, Origin(bytes(32), bytes(16))), STATIC)
    progress = [fields["answers"] for kind, fields in said if kind is Kind.STORED]
    assert progress == [0, 0, 0, 0, 1]
    assert said[-1][0] is Kind.DONE
