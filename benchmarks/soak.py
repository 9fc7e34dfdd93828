"""Many short answers while clients, sessions, dealer and server are killed at random; docs/soak.md.

A server and a dealer run as they are deployed, over TLS. Several clients request answers at the
same time, each repeatedly in processes of its own, live or from a store. The main thread kills: a
client, a session's process at the server or the dealer, the whole dealer, or the whole server.
Whole roles are then restarted at the same address, as systemd would do. Every complete answer is
compared with plaintext's. Every other one must have ended in time, with a one-line error.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil

from mergec.runtime.core.errors import MergecError
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.bundle import load_bundle, role_path
from mergec.runtime.roles.client import Connection
from mergec.runtime.session.requests import Plan
from mergec.runtime.session.stores.folder import stores_below
from mergec.runtime.session.stores.reader import Store
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.authority import make_certificates
from mergec.runtime.transport.connect import Security
from tests import decoder
from tests.roles import environment

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 10.0
"""Seconds that a role waits for a message."""

PLAN = Plan(answers=6, prompt=2, tokens=6)
TOKENS = (2, 5)
"""Fewest and most tokens of an answer."""

LEAK = 16 << 20
"""Bytes that a role's listening process may grow by, because allocators keep some memory."""

START = 120.0


class Service:
    """A role that is restarted whenever it was killed."""

    def __init__(self, name: str, command: list[str], metrics: str, log: Path) -> None:
        self.name, self._command, self._metrics, self._log = name, command, metrics, log
        self.restarts = -1
        self.start()

    def start(self) -> None:
        self.restarts += 1
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_until_up()

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            with suppress(OSError):
                self.metrics()
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        said = self._log.read_text().splitlines() or ["it says nothing"]
        raise SystemExit(f"the {self.name} does not start: {said[-1]}")

    def metrics(self) -> dict[str, float]:
        page = urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=TIMEOUT).read()
        lines = [line.rsplit(" ", 1) for line in page.decode().splitlines() if line[0] != "#"]
        prefix = f"mergec_{self.name}_"
        return {key.removeprefix(prefix): float(value) for key, value in lines}

    def sessions(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            return list(psutil.Process(self.process.pid).children())
        return []

    def kill(self) -> None:
        """Kill all of its processes at once, like a machine that goes down."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def held(self) -> dict[str, int]:
        """Resources of the listening process, once no session is left."""
        deadline = time.monotonic() + 6 * TIMEOUT
        while self.sessions() and time.monotonic() < deadline:
            time.sleep(0.2)
        self.metrics()  # the first request starts the thread that answers
        process, now = psutil.Process(self.process.pid), self.metrics()
        held = {
            "resident bytes": process.memory_info().rss,
            "descriptors": process.num_fds(),
            "processes of sessions": len(process.children()),
            "sessions in metrics": int(now["sessions"]),
        }
        if self.name == "server":
            held["waiting in metrics"] = int(now["queue"])
        return held


@dataclass
class Asked:
    """A requested answer, and its outcome."""

    source: str
    prompt: list[int]
    count: int
    outcome: str = ""
    said: list[int] = field(default_factory=list)


def converse(asked: list[Asked], options: dict[str, Any], store: Path | None, out: Any) -> None:
    """A client's process: requests answers one by one in a session, and reports each outcome."""
    given = None
    try:
        if store is not None:
            given = Store.open(store, options["key"])
        connection = Connection(
            options["bundle"],
            server=options["server"],
            dealer=None if given else options["dealer"],
            store=given,
            security=Security("client", options["certs"]),
            timeout=TIMEOUT,
            join_timeout=TIMEOUT,
        )
        with connection:
            for one in asked:
                tokens = connection.generate(one.prompt, max_tokens=one.count)
                out.send(("done", [token.token for token in tokens]))
    except MergecError as error:
        out.send(("error", str(error)))


def prepare(options: dict[str, Any], root: Path, out: Any) -> None:
    """A client's process: has randomness dealt and stores it."""
    try:
        connection = Connection(
            options["bundle"],
            server=options["server"],
            dealer=options["dealer"],
            security=Security("client", options["certs"]),
            timeout=TIMEOUT,
            join_timeout=TIMEOUT,
        )
        connection.prepare(PLAN, root, options["key"])
        out.send(("done", []))
    except MergecError as error:
        out.send(("error", str(error)))


class Client(threading.Thread):
    """Requests answers until its share is done, in a new process for every few of them."""

    def __init__(self, soak: Soak, number: int, share: int) -> None:
        super().__init__(daemon=True)
        self._soak, self._number, self._left = soak, number, share
        self._random = random.Random(f"{soak.seed} {number}")
        self._root = soak.folder / f"stores-{number}"
        self._useless: set[Path] = set()
        self.process: Any = None
        self.asked: list[Asked] = []
        self.preparations: collections.Counter[str] = collections.Counter()
        self.failure = ""

    def run(self) -> None:
        try:
            while self._left:
                self._soak.gate.wait()
                self._session()
        except Exception as error:  # noqa: BLE001  (reported by the main thread)
            self.failure = f"client {self._number}: {error!r}"

    def _session(self) -> None:
        store = self._store() if self._random.random() < 0.4 else None
        asked = []
        for _ in range(min(self._left, self._random.randint(1, 4))):
            length = self._random.randint(PLAN.prompt, 4)
            prompt = [self._random.randrange(decoder.VOCAB) for _ in range(length)]
            source = "live" if store is None else "store"
            asked.append(Asked(source, prompt, self._random.randint(*TOKENS)))
        said = self._play(converse, asked, self._soak.options(self._number), store)
        for one, (outcome, tokens) in zip(asked, said, strict=False):
            one.outcome = outcome
            one.said = tokens
        if said and "prepare" in said[-1][0] and store is not None:
            self._useless.add(store)  # the message tells a person to prepare another
        # Answers after the one that failed were not requested.
        tried = asked[: len(said)]
        self.asked += tried
        self._left -= len(tried)
        self._soak.done += len(tried)

    def _store(self) -> Path | None:
        """A store with answers left, a new one if necessary; None if none could be made."""
        if not self._filled():
            ((outcome, _),) = self._play(prepare, self._soak.options(self._number), self._root)
            self.preparations[outcome] += 1
        found = self._filled()
        return found[0] if found else None

    def _filled(self) -> list[Path]:
        key = self._soak.options(self._number)["key"]
        places = [place for place in stores_below(self._root) if place not in self._useless]
        return [place for place in places if Store.open(place, key).left()]

    def _play(self, work: Any, *arguments: Any) -> list[tuple[str, list[int]]]:
        """Outcomes of a client's process, in order; the last one may be an error, or "killed"."""
        ours, theirs = self._soak.context.Pipe(duplex=False)
        self.process = self._soak.context.Process(target=work, args=(*arguments, theirs))
        with self._soak.starting:
            self.process.start()
        theirs.close()
        outcomes: list[tuple[str, list[int]]] = []
        try:
            while ours.poll(self._soak.patience):
                kind, said = ours.recv()
                if kind == "error":
                    outcomes.append((f"error: {said}", []))
                else:
                    outcomes.append(("done", said))
            outcomes.append(("hang", []))
            self.process.kill()
        except EOFError:
            pass
        finally:
            ours.close()
        wait([self.process.sentinel])
        with self._soak.starting:
            ended = self.process.exitcode
        if ended == -signal.SIGKILL and outcomes[-1:] != [("hang", [])]:
            outcomes.append(("killed", []))
        elif ended not in (0, -signal.SIGKILL):
            outcomes.append((f"crashed: exit code {ended}", []))
        return outcomes


class Soak:
    """One run and its results."""

    def __init__(self, folder: Path, answers: int, clients: int, seed: int) -> None:
        self.folder, self.answers, self.seed = folder, answers, seed
        self.done = 0
        self.gate = threading.Event()
        """Closed while the services should be idle."""
        self.gate.set()
        self.patience = 6 * TIMEOUT
        """Seconds within which a client's process must report something; otherwise it hangs."""
        self.starting = threading.Lock()
        """Starting a process reaps ended ones, which only one thread may do at a time."""
        self.kills: collections.Counter[str] = collections.Counter()
        self._random = random.Random(f"{seed} kills")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.preloaded"])
        self.bundles = decoder.save(folder / "bundles", model="tiny")
        names = tuple(f"client-{n}" for n in range(clients))
        make_certificates(folder / "certs", names)
        (folder / "server.key").write_text(secrets.token_hex(32))
        self._keys = [secrets.token_bytes(32) for _ in names]
        self.places = {name: f"127.0.0.1:{free_port()}" for name in ("server", "dealer")}
        self.services = {name: self._service(name) for name in ("dealer", "server")}
        share = [answers // clients + (n < answers % clients) for n in range(clients)]
        self.clients = [Client(self, n, count) for n, count in enumerate(share)]

    def _service(self, name: str) -> Service:
        metrics = f"127.0.0.1:{free_port()}"
        options = {
            "--listen": self.places[name],
            "--certs": str(self.folder / "certs"),
            "--timeout": str(TIMEOUT),
            "--idle-timeout": str(2 * TIMEOUT),
            "--metrics": metrics,
        }
        if name == "server":
            options["--dealer"] = self.places["dealer"]
            options["--rate"] = "0"
            options["--stores"] = str(self.folder / "stores")
            options["--store-key"] = str(self.folder / "server.key")
        command = "serve" if name == "server" else "deal"
        given = [text for pair in options.items() for text in pair]
        return Service(
            name,
            [
                sys.executable,
                "-m",
                "mergec.runtime.cli",
                command,
                str(self.bundles),
                *given,
            ],
            metrics,
            self.folder / f"{name}.log",
        )

    def options(self, number: int) -> dict[str, Any]:
        """Options of a client's process."""
        return {
            "bundle": self.bundles / "client",
            "server": Address.parse(self.places["server"]),
            "dealer": Address.parse(self.places["dealer"]),
            "certs": self.folder / "certs" / f"client-{number}",
            "key": self._keys[number],
        }

    def run(self, interval: float) -> dict[str, dict[str, dict[str, int]]]:
        """Ask and kill until all answers are done; returns the services' resources."""
        before: dict[str, dict[str, int]] = {}
        for client in self.clients:
            client.start()
        while any(client.is_alive() for client in self.clients):
            time.sleep(interval * self._random.uniform(0.3, 1.7))
            # Whole roles in the first half; the second shows whether a role that stays up leaks.
            whole = self.done < self.answers // 2
            if not whole and not before:
                before = self._held()
            self._kill(whole)
        after = self._held()
        return {name: {"before": before[name], "after": after[name]} for name in self.services}

    def _held(self) -> dict[str, dict[str, int]]:
        self.gate.clear()
        found = {name: service.held() for name, service in self.services.items()}
        self.gate.set()
        return found

    def _kill(self, whole: bool) -> None:
        kinds = ["client", "session of the server", "session of the dealer"]
        kind = self._random.choice([*kinds, *kinds, "dealer", "server"] if whole else kinds)
        if kind in self.services:
            self.services[kind].kill()
            self.kills[kind] += 1
            time.sleep(self._random.uniform(0, 2))
            self.services[kind].start()
            return
        if kind == "client":
            processes = [client.process for client in self.clients if client.process is not None]
        else:
            processes = self.services[kind.split()[-1]].sessions()
        alive = [process for process in processes if process.pid]
        if alive:
            with suppress(psutil.Error, ProcessLookupError):
                self._random.choice(alive).kill()
                self.kills[kind] += 1


def free_port() -> int:
    """A port for a service that is restarted at the same address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def entries_of(mine: Store, theirs: Path, key: bytes) -> tuple[int, str]:
    """How many answers a client has used of a store, and a fault if the server's part disagrees."""
    journal = mine.journal()
    if not theirs.is_dir():
        return journal.head.used, ""
    other = Store.open(theirs, key).journal()
    # The client enters an answer first, and may have been killed before the server heard of it.
    if journal.head in (other.head, other.head.after(journal.tag)):
        return journal.head.used, ""
    fault = f"{theirs}: {other.head.used} answers used, at the client {journal.head.used}"
    return journal.head.used, fault


def kind_of(error: str) -> str:
    """An error without the parts that differ between occurrences."""
    plain = re.sub(r"/\S+: ", "a store: ", error)
    return re.sub(r"\b(?:[0-9][0-9.:]*|[0-9a-f]{8})(?=[\s,;)]|$)", "n", plain)


@dataclass
class Verdict:
    """The results, and the conditions that were violated."""

    figures: dict[str, Any]
    faults: list[str]


def judge(soak: Soak, held: dict[str, dict[str, dict[str, int]]], seconds: float) -> Verdict:
    """Compare every answer with plaintext's, and check for leftovers."""
    asked = [one for client in soak.clients for one in client.asked]
    plain = PlainExecutor(load_bundle(role_path(soak.bundles, "server"), "server"))
    faults = [client.failure for client in soak.clients if client.failure]
    outcomes: collections.Counter[str] = collections.Counter()
    errors: collections.Counter[str] = collections.Counter()
    completed: collections.Counter[str] = collections.Counter()
    for one in asked:
        what = one.outcome.split(":")[0]
        outcomes[what] += 1
        if what == "done":
            completed[one.source] += 1
            due = [token for token, _ in plain.generate(one.prompt, one.count)]
            if one.said != due:
                faults.append(f"{one.prompt}: said {one.said}, plaintext {due}")
        elif what == "error":
            errors[kind_of(one.outcome.removeprefix("error: "))] += 1
        elif what != "killed":
            faults.append(f"{one.prompt}: {one.outcome}")
    clear = re.compile(r"(the (client|server|dealer)|a store:) [^\n]+")
    faults += [f"not a clear error: {error}" for error in errors if not clear.fullmatch(error)]
    entries = 0
    key = bytes.fromhex((soak.folder / "server.key").read_text())
    for root in sorted(soak.folder.glob("stores*")):
        for place in root.iterdir():
            if place.name.startswith("."):
                faults.append(f"{place}: an unfinished store was left behind")
            elif root.name != "stores":
                number = int(root.name.removeprefix("stores-"))
                mine = Store.open(place, soak.options(number)["key"])
                count, fault = entries_of(mine, soak.folder / "stores" / place.name, key)
                entries += count
                faults += [fault] if fault else []
    if entries < completed["store"]:
        faults.append(f"{completed['store']} answers from stores, but {entries} noted as used")
    for name, times in held.items():
        before, after = times["before"], times["after"]
        for what, least in after.items():
            room = LEAK if what == "resident bytes" else 0
            if least > before[what] + room:
                faults.append(f"{name}: {what}: {before[what]} before, {least} after")
        if any(after[what] for what in after if "sessions" in what or "waiting" in what):
            faults.append(f"{name}: sessions are left: {after}")
        log = (soak.folder / f"{name}.log").read_text()
        found = re.search(r"^.*(Traceback|internal error)(.*\n?){,15}", log, re.MULTILINE)
        if found:
            faults.append(f"{name}: an error of our own in its log:\n{found[0]}")
    preparations = sum((client.preparations for client in soak.clients), collections.Counter())
    figures = {
        "seed": soak.seed,
        "seconds": round(seconds),
        "clients": len(soak.clients),
        "answers": len(asked),
        "outcomes": dict(outcomes),
        "completed": dict(completed),
        "errors": dict(errors.most_common()),
        "preparations": {
            what: sum(n for key, n in preparations.items() if key.split(":")[0] == what)
            for what in ("done", "killed", "error")
        },
        "kills": dict(soak.kills),
        "restarts": {name: service.restarts for name, service in soak.services.items()},
        "entries": entries,
        "held": held,
    }
    return Verdict(figures, faults)


PAGE = """# Soak

`make soak`: clients request short answers concurrently, each in processes of its own, over TLS,
live or from stored randomness, while clients, sessions, the dealer and the server are killed at
random (SIGKILL). Server and dealer are then restarted at the same address. The model is a decoder
with one layer. Requirements: every complete answer equals plaintext's; every other one ended with
a one-line error within the timeouts; nothing hangs; at the end the services hold the same
resources as before; and the journals of a store's two parts agree on the answers used.

Seed {seed}, {clients} clients, {seconds} s on a machine with other work. All requirements were met.

| answers | |
| --- | ---: |
| requested | {answers} |
| complete, and equal to plaintext's | {done} |
| of these live | {live} |
| of these from a store | {stored} |
| client killed in the meantime | {killed} |
| ended by an error | {error} |
| wrong, or never finished | 0 |

| killed | times |
| --- | ---: |
{kills}

Stores: {prepared} were prepared, {unprepared} preparations were killed or ended by an error. The
clients marked {entries} answers as used.

| error at the client | times |
| --- | ---: |
{errors}

Resources of the listening processes when idle, after the last time that a whole role was killed,
and at the end:

| | before | after |
| --- | ---: | ---: |
{held}
"""


def page(figures: dict[str, Any]) -> str:
    """The text of docs/soak.md."""

    def rows(found: dict[str, int]) -> str:
        return "\n".join(f"| {what} | {count} |" for what, count in found.items())

    outcomes, prepared = figures["outcomes"], figures["preparations"]
    return PAGE.format(
        **{key: figures[key] for key in ("seed", "clients", "seconds", "answers", "entries")},
        **{key: outcomes.get(key, 0) for key in ("done", "killed", "error")},
        live=figures["completed"].get("live", 0),
        stored=figures["completed"].get("store", 0),
        kills=rows(figures["kills"]),
        errors=rows(figures["errors"]),
        prepared=prepared["done"],
        unprepared=prepared["killed"] + prepared["error"],
        held="\n".join(
            f"| {name}: {what} | {count:,} | {times['after'][what]:,} |"
            for name, times in figures["held"].items()
            for what, count in times["before"].items()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--interval", type=float, default=3.0, help="seconds between two kills")
    parser.add_argument("--output", type=Path, help="write docs/soak.md here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.answers, options.clients, options.seed)
        try:
            began = time.monotonic()
            held = soak.run(options.interval)
            verdict = judge(soak, held, time.monotonic() - began)
        finally:
            for service in soak.services.values():
                service.kill()
    print(json.dumps(verdict.figures, indent=1))
    if verdict.faults:
        raise SystemExit("\n".join(verdict.faults))
    if options.output:
        options.output.write_text(page(verdict.figures))


if __name__ == "__main__":
    main()
