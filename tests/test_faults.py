"""Any of the three roles killed, stopped, cut off or slowed, at any moment of a session.

A relay on each of the three connections causes the fault at a given frame. The remaining roles must
end the session with one line within the timeout and free its memory. The server keeps running, and
the same client may start again immediately.
"""

from __future__ import annotations

import itertools
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mergec.runtime.session.stores.folder import stores_below
from mergec.runtime.transport.frames import Kind
from tests import decoder
from tests.relay import DOWN, UP, Pair, Relay, Spot
from tests.services import START, Process, Role, wait_until

PROMPT = [5, 1, 7]
TOKENS = 6
TIMEOUT = 5
TIMES = ("--plaintext", "--timeout", str(TIMEOUT), "--idle-timeout", str(2 * TIMEOUT))
"""A client that is stopped once its session is open cannot be told from one that thinks."""

MARGIN = 60.0
"""Seconds beyond the timeout after which something hangs; a busy machine takes many of them."""

LINKS = ("client-server", "client-dealer", "server-dealer")

STEPS = {"prompt": 1, "decoding": 3}
FAULTS = {"silence": Pair.silence, "reset": Pair.reset, "trickle": Pair.trickle}
PHASES = ("handshake", "preparation", "setup", *STEPS)


def spots(link: str, phase: str) -> list[Spot]:
    """The place of a phase on a connection."""
    if phase == "handshake":
        return [(UP, Kind.HELLO, 1)]
    if phase in STEPS:
        asked: list[Spot] = [(UP, Kind.STEP, STEPS[phase])]
        return [*asked, (DOWN, Kind.ROUND, 2)] if link == LINKS[0] else asked
    if link == LINKS[0]:
        return [(DOWN, Kind.STORED if phase == "preparation" else Kind.ROUND, 1)]
    if phase == "preparation":
        return [(UP, Kind.PLAN, 1)]
    return [(DOWN, Kind.SEED, 1)]


@dataclass
class Site:
    """The three roles with a relay on each connection; killed roles can be restarted."""

    folder: Path
    bundles: Path
    relays: dict[str, Relay]
    server: Role = field(init=False)
    dealer: Role = field(init=False)

    @property
    def roles(self) -> dict[str, Role]:
        return {"server": self.server, "dealer": self.dealer}

    def restart(self, name: str) -> None:
        self.roles[name].end()
        if name == "server":
            self.start_server()
        else:
            self.start_dealer()

    def start_dealer(self) -> None:
        self.dealer = Role("deal", self.bundles, *TIMES)
        for link in LINKS[1:]:
            self.relays[link].target = self.dealer.address

    def start_server(self) -> None:
        self.server = Role(
            *("serve", self.bundles, *TIMES),
            *("--dealer", str(self.relays[LINKS[2]].address)),
            *("--stores", str(self.folder / "stores"), "--store-key", str(self.folder / "key")),
        )
        self.relays[LINKS[0]].target = self.server.address

    def client(self, command: str, *options: str) -> tuple[Process, Path]:
        output = self.folder / f"client-{time.monotonic_ns()}"
        places = [
            *("--server", str(self.relays[LINKS[0]].address)),
            *("--dealer", str(self.relays[LINKS[1]].address)),
        ]
        given = [command, str(self.bundles), *places, "--plaintext", *options]
        return Process(given, output), output

    def generate(self, timeout: float = TIMEOUT) -> tuple[Process, Path]:
        prompt = " ".join(map(str, PROMPT))
        return self.client(
            *("generate", "--ids", "-p", prompt, "--max-tokens", str(TOKENS)),
            *("--timeout", str(timeout)),
        )

    def prepare(self) -> tuple[Process, Path]:
        place = ("--store", str(self.folder / "mine"), "--store-key", str(self.folder / "key"))
        plan = ("--tokens", "12", "--answer", "4", "--prompt", "2", "--timeout", str(TIMEOUT))
        return self.client("prepare", *place, *plan)

    def work(self, phase: str) -> tuple[Process, Path]:
        return self.prepare() if phase == "preparation" else self.generate()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("faults")
    bundles = decoder.save(folder / "bundles", model="tiny")
    (folder / "key").write_text("ab" * 32)
    with ExitStack() as stack:
        relays = {link: Relay() for link in LINKS}
        for relay in relays.values():
            stack.callback(relay.close)
        made = Site(folder, bundles, relays)
        made.start_dealer()
        stack.callback(lambda: made.dealer.end())
        made.start_server()
        stack.callback(lambda: made.server.end())
        yield made


def one_line(output: Path) -> str:
    """The output of a client that failed, which must be one line about a role."""
    (line,) = [text for text in output.read_text().splitlines() if text.startswith("error: ")]
    assert re.match(r"error: (the )?(client|server|dealer) ", line), line
    assert "Traceback" not in output.read_text()
    return line


def reasons(role: Role) -> list[str]:
    return [line["reason"] for line in role.log if line["event"] == "session failed"]


def counts(site: Site) -> dict[str, int]:
    """The number of failures that each service has logged."""
    return {name: len(reasons(role)) for name, role in site.roles.items()}


def check_ended(site: Site, before: dict[str, int], *but: str) -> None:
    """The services, `but` some, have ended their sessions with a reason and released everything."""
    for name, role in site.roles.items():
        if name in but:
            continue
        wait_until(lambda role=role: not role.workers, TIMEOUT + MARGIN)
        for reason in reasons(role)[before[name] :]:
            assert re.match(r"the (client|server|dealer|session) ", reason), reason
        assert "Traceback" not in role.output


def check_goes_on(site: Site) -> None:
    """The same client starts again; a failed preparation leaves nothing behind on one side."""
    process, output = site.generate(60)
    assert process.wait() == 0, output.read_text()
    said = [int(word) for word in output.read_text().split()[:TOKENS]]
    assert said == decoder.plaintext(site.bundles, PROMPT, TOKENS)
    wait_until(lambda: not any(role.workers for role in site.roles.values()), TIMEOUT + MARGIN)
    mine, theirs = (stores_below(site.folder / name) for name in ("mine", "stores"))
    assert [place.name for place in mine] == [place.name for place in theirs]
    if (site.folder / "stores").is_dir():
        assert len(list((site.folder / "stores").iterdir())) == len(theirs)


# Every case is one of a kind, and most wait for a timeout: a few stand for the others.
QUICK = {
    ("client", "kill", "prompt"),
    ("dealer", "kill", "decoding"),
    ("server", "kill", "setup"),
    ("server", "stop", "decoding"),
    ("client-server", "silence", "decoding"),
    ("client-dealer", "silence", "prompt"),
    ("server-dealer", "reset", "decoding"),
    ("client-server", "reset", "preparation"),
    ("server-dealer", "trickle", "setup"),
}


def cases(first: tuple[str, ...], faults: tuple[str, ...]) -> list[object]:
    return [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(case))
        for case in itertools.product(first, faults, PHASES)
    ]


@pytest.mark.parametrize(
    ("victim", "fault", "phase"), cases(("client", "server", "dealer"), ("kill", "stop"))
)
def test_a_role_that_is_killed_or_stopped(site: Site, victim: str, fault: str, phase: str) -> None:
    before = counts(site)
    number = signal.SIGKILL if fault == "kill" else signal.SIGSTOP
    # The dealer is asked only when the client has a place.
    late = (victim, phase) == ("dealer", "handshake")
    where = [(DOWN, Kind.ADMITTED, 1)] if late else spots(LINKS[0], phase)
    hit = {name: role.process for name, role in site.roles.items()}
    relay = site.relays[LINKS[0]]
    relay.arm(where, lambda _: hit[victim].signal_all(number))
    hit["client"], output = site.work(phase)
    try:
        assert relay.fired.wait(START), output.read_text()
        if victim != "client":
            assert hit["client"].wait(TIMEOUT + MARGIN) == 1
            one_line(output)
        check_ended(site, before, victim)
    finally:
        hit["client"].signal_all(signal.SIGKILL)
        hit[victim].signal_all(signal.SIGCONT)
    if fault == "kill" and victim != "client":
        site.restart(victim)
    check_goes_on(site)


@pytest.mark.parametrize(("link", "fault", "phase"), cases(LINKS, ("silence", "reset", "trickle")))
def test_a_connection_that_fails(site: Site, link: str, fault: str, phase: str) -> None:
    before = counts(site)
    relay = site.relays[link]
    relay.arm(spots(link, phase), FAULTS[fault])
    process, output = site.work(phase)
    try:
        assert relay.fired.wait(START), output.read_text()
        assert process.wait(TIMEOUT + MARGIN) == 1
        one_line(output)
        check_ended(site, before)
    finally:
        relay.disarm()
        process.signal_all(signal.SIGKILL)
    check_goes_on(site)


def test_slow_connections_take_longer_and_change_nothing(site: Site) -> None:
    for relay in site.relays.values():
        relay.delay = 0.02
    try:
        check_goes_on(site)
    finally:
        for relay in site.relays.values():
            relay.delay = 0.0
