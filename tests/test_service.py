"""Client, server and dealer as they are deployed: answers, limits, shutdown, and faults."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mergec.runtime.cli import INTERRUPTED, run
from mergec.runtime.core.errors import BusyError, PartyError, PromptError
from mergec.runtime.core.spec import DEALER
from mergec.runtime.program.bundle import save_bundle
from mergec.runtime.roles.dealer_desk import DealerDesk
from mergec.runtime.roles.dealer_session import hear, tell
from mergec.runtime.roles.observe import Metrics, PartyMetrics
from mergec.runtime.roles.server_desk import ServerDesk
from mergec.runtime.roles.settings import Limits
from mergec.runtime.roles.turnover import Turnover
from mergec.runtime.roles.worker import Parent
from mergec.runtime.session import handshake
from mergec.runtime.session.handshake import Origin
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.requests import Plan
from mergec.runtime.session.stores.reader import Store
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.authority import make_certificates
from mergec.runtime.transport.connect import Security, listen
from mergec.runtime.transport.frames import Kind
from tests import decoder
from tests.roles import ROOT, environment
from tests.services import START, Deployment, Role, deployment, wait_until
from tests.test_manifest import PASS

PROMPT = [5, 1, 7]
TIMES = ("--timeout", "8", "--grace", "5")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("service"), model="tiny")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, ("ann", "bob"))
    return folder


@pytest.fixture(scope="module")
def deployed(bundles: Path, certificates: Path) -> Iterator[Deployment]:
    """Three roles' worth of TLS, with room for two sessions."""
    security = ("--certs", str(certificates), *TIMES)
    common = (*security, "--metrics", "127.0.0.1:0")
    limits = ("--sessions", "2", "--queue", "1", "--tokens", "9")
    with deployment(bundles, serve=(*common, *limits), deal=common) as made:
        yield made


@pytest.fixture
def running(deployed: Deployment) -> Deployment:
    """Wait until every slot is free: sessions of the previous test may still be ending."""
    wait_until(lambda: not deployed.server.workers and not deployed.dealer.workers)
    return deployed


@pytest.fixture
def ann(certificates: Path) -> Security:
    return Security("client", certificates / "ann")


def tokens(connection, prompt=PROMPT, count=4):
    return [token.token for token in connection.generate(prompt, max_tokens=count)]


def ended(role: Role) -> int:
    """The number of sessions whose end a role has logged."""
    return sum(line["event"] == "session ended" for line in role.log)


def test_a_session_gives_answer_after_answer(running, bundles, ann) -> None:
    with running.connection(security=ann) as connection:
        assert connection.setup.received > 0
        for prompt in (PROMPT, [2], [3, 3, 3, 3]):
            assert tokens(connection, prompt) == decoder.plaintext(bundles, prompt, 4)
        # An answer that is given up after a token leaves the session as it was.
        for token in connection.generate(PROMPT, max_tokens=9):
            assert token.token == decoder.plaintext(bundles, PROMPT, 1)[0]
            break
        assert connection.is_open
        assert tokens(connection) == decoder.plaintext(bundles, PROMPT, 4)


def test_clients_are_served_side_by_side_and_wait_for_a_place(
    running, bundles, certificates
) -> None:
    names = ["ann", "bob", "bob"]
    places: list[int] = []
    waiting = threading.Event()

    def wait(place: int) -> None:
        places.append(place)
        waiting.set()

    def ask(number: int) -> list[int]:
        security = Security("client", certificates / names[number])
        with running.connection(security=security, on_wait=wait) as connection:
            answer = tokens(connection, [number + 1, 4])
            assert waiting.wait(START), "the two that come first stay until the third waits"
            return answer

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, range(3)))
    assert answers == [decoder.plaintext(bundles, [n + 1, 4], 4) for n in range(3)]
    assert places == [1]


def test_a_full_queue_turns_clients_away(running, ann) -> None:
    with running.connection(security=ann), running.connection(security=ann):
        waiting = threading.Event()
        third = running.connection(security=ann, on_wait=lambda _: waiting.set())
        with ThreadPoolExecutor(1) as pool:
            opened = pool.submit(third.open)
            assert waiting.wait(START)
            fourth = running.connection(security=ann)
            busy = r"the server says: it is busy: 2 sessions, 1 clients wait; try again in \d+ s"
            with pytest.raises(BusyError, match=busy) as found:
                fourth.open()
            assert f"in {found.value.wait} s" in str(found.value)
            third._peers.channels[0].fail("changed my mind")
            with pytest.raises(PartyError):
                opened.result(START)


def test_a_dealer_without_room_says_when_to_come_back(bundles) -> None:
    with deployment(bundles, deal=("--sessions", "1")) as made, made.connection() as first:
        busy = r"the dealer says: it is busy with 1 sessions; try again in \d+ s"
        with pytest.raises(BusyError, match=busy) as found:
            made.connection().open()
        assert found.value.wait >= 1
        assert made.server.wait_for("session refused")["level"] == "warning"
        assert tokens(first) == decoder.plaintext(bundles, PROMPT, 4)


def test_the_wait_for_a_place_follows_from_how_long_places_were_taken(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mergec.runtime.roles.turnover.time.monotonic", lambda: now[0])
    turnover = Turnover(2)
    assert turnover.wait(0) == 1, "nothing is known yet"
    for holder, seconds in (("one", 40.0), ("two", 20.0)):
        turnover.take(holder)
        now[0] += seconds
        turnover.leave(holder)
    turnover.leave("nobody")
    assert [turnover.wait(ahead) for ahead in range(4)] == [15, 30, 45, 60]
    turnover.take("three")
    now[0] += 90.5  # longer than those before
    assert turnover.wait(0) == 46
    now[0] += 1e6
    assert turnover.wait(9) == 3600


def test_limits_refuse_a_prompt_and_leave_the_session_open(running, bundles, ann) -> None:
    with running.connection(security=ann) as connection:
        with pytest.raises(PromptError, match="an answer may have 9 tokens"):
            tokens(connection, [1], 10)
        with pytest.raises(PromptError, match="more than this program's 16"):
            tokens(connection, [1] * 10, 9)
        assert tokens(connection) == decoder.plaintext(bundles, PROMPT, 4)


def test_a_certificate_of_another_role_is_turned_away(running, certificates) -> None:
    dealer = Security("dealer", certificates)
    with pytest.raises(PartyError, match="only the client may connect here, not dealer"):
        running.connection(security=dealer).open()


def test_metrics_and_logs_tell_what_happened_but_no_secret(running, bundles, ann) -> None:
    secret = [11, 11, 10, 12, 9, 8, 11]

    def read(role: str) -> tuple[str, dict[str, str]]:
        url = f"http://{running.roles[role].metrics}/metrics"
        page = urllib.request.urlopen(url, timeout=START).read().decode()
        return page, dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")

    def counted(role: str) -> int:
        return int(float(read(role)[1].get(f'mergec_{role}_sessions_ended_total{{how="done"}}', 0)))

    before = {name: (ended(role), counted(name)) for name, role in running.roles.items()}
    with running.connection(security=ann) as connection:
        said = tokens(connection, secret)
    for role, connections in (("server", 1), ("dealer", 2)):
        logged, done = before[role]
        running.roles[role].wait_for("session ended", logged + connections)
        wait_until(lambda role=role, least=done + connections: counted(role) >= least)
    logs = running.server.output + running.dealer.output
    names = ["sessions", 'bytes_total{kind="offline"}', 'sessions_ended_total{how="done"}']
    names += [f'step_seconds_count{{phase="{phase}"}}' for phase in ("prompt", "decode")]
    online = ["rounds_total", 'bytes_total{kind="sent"}', 'bytes_total{kind="received"}', "queue"]
    for role, more in (("server", online), ("dealer", [])):
        page, values = read(role)
        assert float(values[f'mergec_{role}_tokens_total{{phase="prompt"}}']) >= len(secret)
        for name in names + more:
            assert float(values[f"mergec_{role}_{name}"]) > 0 or name in ("sessions", "queue")
        # No series of what only the other has.
        assert all((f"mergec_{role}_{name}" in values) == (name in more) for name in online)
        assert "stored" not in page
        logs += page
    assert '"client": "ann"' in logs
    for shown in (str(secret)[1:-1], str(said)[1:-1], "weight", "Traceback"):
        assert shown not in logs
    held = [weight.numpy().tobytes()[:16] for weight in decoder.weights().values()]
    kept = {
        role: b"".join(f.read_bytes() for f in (bundles / role).rglob("*") if f.is_file())
        for role in ("client", "server", "dealer")
    }
    for words in held:
        found = [role for role, content in kept.items() if words in content]
        assert found == ["server"]


def test_a_dealer_that_tells_two_salts_is_noticed(running, ann, monkeypatch) -> None:
    real = handshake.receive_origin
    monkeypatch.setattr(handshake, "receive_origin", lambda c: Origin(real(c).seed, bytes(16)))
    with pytest.raises(PartyError, match="the server says: the client has another salt than this"):
        tokens(running.connection(security=ann))
    assert "so the dealer told them different ones" in running.server.output


def test_a_session_that_is_killed_ends_alone(running, bundles, certificates, ann) -> None:
    bob = Security("client", certificates / "bob")
    with running.connection(security=bob) as other:
        before = {worker.pid for worker in running.server.workers}
        connection = running.connection(security=ann)
        answer = connection.generate(PROMPT, max_tokens=9)
        next(answer)
        (worker,) = [w for w in running.server.workers if w.pid not in before]
        worker.kill()
        with pytest.raises(PartyError, match="the server went away"):
            list(answer)
        assert tokens(other) == decoder.plaintext(bundles, PROMPT, 4)
    with running.connection(security=ann) as again:
        assert tokens(again) == decoder.plaintext(bundles, PROMPT, 4)


def test_a_stopped_session_of_the_dealer_is_named_by_both_within_the_timeout(running, ann) -> None:
    connection = running.connection(security=ann)
    answer = connection.generate(PROMPT, max_tokens=9)
    next(answer)
    for worker in running.dealer.workers:
        worker.suspend()
    try:
        # The client itself would wait for 20 s.
        with pytest.raises(PartyError, match="the server says: the dealer sent nothing for 8 s"):
            list(answer)
    finally:
        for worker in running.dealer.workers:
            worker.kill()


def test_strangers_hold_nobody_up_and_do_not_stay(running, bundles, ann) -> None:
    strangers = []
    for address in (running.server.address, running.dealer.address):
        for said in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            bytes(100),
            b"\x16\x03\x01\xff\xff" + bytes(50),
        ):
            stranger = socket.create_connection((address.host, address.port))
            stranger.sendall(said)
            strangers.append(stranger)
    with running.connection(security=ann) as connection:
        assert tokens(connection) == decoder.plaintext(bundles, PROMPT, 4)
    wait_until(lambda: "does not use TLS" in running.server.output)
    for stranger in strangers:
        stranger.close()
    wait_until(lambda: not running.server.workers and not running.dealer.workers)


def test_a_handshake_a_byte_at_a_time_does_not_last(running) -> None:
    def trickle(role: Role) -> None:
        with socket.create_connection((role.address.host, role.address.port)) as slow:
            slow.sendall(b"\x16\x03\x01\x02\x00")
            with pytest.raises(OSError, match=r"reset|Broken"):
                for _ in range(int(START / 0.2)):
                    slow.sendall(b"\x01")
                    time.sleep(0.2)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(trickle, (running.server, running.dealer)))


HELD, TIMEOUT = 7.0, 3
"""Seconds that a step is held up at the dealer, and that the parties wait for a sign of life."""


def hold() -> None:
    """At the dealer: deal each prompt only after a while, in which it does something else."""
    hold_for(HELD)


def hold_on() -> None:
    """At the dealer: deal no prompt."""
    hold_for(10 * START)


def hold_for(seconds: float) -> None:
    real = MergecSession.step

    def step(self, new: int, past: int, *args, **more):
        if not past and self.party == DEALER:
            time.sleep(seconds)
        return real(self, new, past, *args, **more)

    MergecSession.step = step


HELD_UP = ("--timeout", str(TIMEOUT), "--grace", "5", "--metrics", "127.0.0.1:0")


@pytest.mark.slow
def test_a_dealer_that_takes_longer_than_the_timeout_is_waited_for(bundles, tmp_path) -> None:
    (tmp_path / "key").write_text("ab" * 32)
    stores = ("--stores", str(tmp_path / "stores"), "--store-key", str(tmp_path / "key"))
    serve = (*HELD_UP, *stores)
    with deployment(bundles, serve=serve, deal=HELD_UP, patch=hold) as made:
        with made.connection(timeout=TIMEOUT) as connection:
            for prompt in (PROMPT, [2]):
                said = list(connection.generate(prompt, max_tokens=4))
                assert [t.token for t in said] == decoder.plaintext(bundles, prompt, 4)
                assert said[0].reports[0].seconds > HELD
        key = bytes.fromhex("ab" * 32)
        place, _ = made.connection(timeout=TIMEOUT).prepare(Plan(2, 2, 4), tmp_path / "mine", key)
        with made.connection(dealer=None, store=Store.open(place, key)) as connection:
            assert tokens(connection, [4, 1]) == decoder.plaintext(bundles, [4, 1], 4)
        for role in made.roles.values():
            wait_until(lambda role=role: not role.workers)
            assert "failed" not in role.output


@pytest.mark.slow
def test_a_dealer_that_is_at_work_for_ever_is_given_up(bundles) -> None:
    """The tiny step may take five times the timeout, and no longer."""
    with deployment(bundles, serve=HELD_UP, deal=HELD_UP, patch=hold_on) as made:
        began = time.monotonic()
        with pytest.raises(PartyError, match="the dealer says that it is at work, but sent nothi"):
            tokens(made.connection())
        assert time.monotonic() - began > 4 * TIMEOUT
        told = made.server.wait_for("session failed")["reason"]
        assert told.startswith("the dealer says that it is at work, but sent nothing for ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_dealer_that_ends_at_work_is_noticed_in_time(bundles, number) -> None:
    with (
        deployment(bundles, serve=HELD_UP, deal=HELD_UP, patch=hold_on) as made,
        ThreadPoolExecutor(1) as pool,
    ):
        connection = made.connection()
        connection.open()
        asked = pool.submit(tokens, connection)
        # Heartbeats have come, so it has been at work.
        wait_until(lambda: connection._peers.channels and connection._peers.channels[1]._alive)
        began = time.monotonic()
        for worker in made.dealer.workers:
            worker.send_signal(number)
        with pytest.raises(PartyError, match=r"the dealer (sent nothing for 3 s|went away)"):
            asked.result()
        # Well before the limit of a step.
        assert time.monotonic() - began < 4 * TIMEOUT
        for worker in made.dealer.workers:
            worker.kill()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, GeneratorExit, SystemExit])
def test_a_person_who_stops_within_a_step_is_no_failure(running, ann, stop, monkeypatch) -> None:
    """Whatever ends the client's code ends the session; nobody calls that a failure."""
    before = {
        name: sum(line["event"] == "session stopped" for line in role.log)
        for name, role in running.roles.items()
    }
    failed = {name: role.output.count("session failed") for name, role in running.roles.items()}
    connection = running.connection(security=ann)
    answer = connection.generate(PROMPT, max_tokens=9)
    next(answer)

    def press(*_: object) -> None:
        raise stop

    # By now both other roles are told of the step.
    monkeypatch.setattr(connection._session.steps._executor, "step", press)
    with pytest.raises(stop):
        next(answer)
    assert not connection.is_open
    for name, connections in (("server", 1), ("dealer", 2)):
        role = running.roles[name]
        told = role.wait_for("session stopped", before[name] + connections)
        assert told["level"] == "info"
        assert "says: it was stopped" in told["reason"] or "says: the client says" in told["reason"]
        wait_until(lambda role=role: not role.workers)
        assert role.output.count("session failed") == failed[name]
        url = f"http://{role.metrics}/metrics"
        counted = f'mergec_{name}_sessions_ended_total{{how="stopped"}}'
        wait_until(lambda url=url, c=counted: c in urllib.request.urlopen(url).read().decode())


CLIENT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.fork import prepare_to_fork
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security
prepare_to_fork()  # what takes long the first time must not be taken for silence
bundle, server, dealer, certificates = sys.argv[1:]
connection = Connection(
    Path(bundle), server=Address.parse(server), dealer=Address.parse(dealer),
    security=Security("client", Path(certificates)),
)
for token in connection.generate([5, 1, 7], max_tokens=9):
    print("token", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_goes_away_frees_its_place(running, certificates, ann, how) -> None:
    ended = sum(line["event"] == "session failed" for line in running.server.log)
    places = (str(running.server.address), str(running.dealer.address))
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", CLIENT, str(running.bundles / "client")),
            *(*places, str(certificates / "ann")),
        ],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "token\n"
        process.send_signal(how)
        told = running.server.wait_for("session failed", ended + 1)
        went = "went away" if how == signal.SIGKILL else "sent nothing for 8 s"
        assert went in told["reason"]
        wait_until(lambda: not running.server.workers and not running.dealer.workers)
    finally:
        process.kill()
        process.communicate()


def test_other_programs_are_named_at_both_ends(running, tmp_path, ann) -> None:
    other = decoder.save(tmp_path / "other", passes=[PASS])
    connection = running.connection(security=ann)
    mismatched = Deployment(other, running.server, running.dealer).connection(security=ann)
    with pytest.raises(PartyError, match=r"the server has a program of other passes \(fuse_glu:2"):
        mismatched.open()
    named = "the client has a program of other passes (fuse_glu:2)"
    wait_until(lambda: named in running.server.output)
    connection.close()


def test_the_command_line_streams_an_answer_over_tls(running, bundles, certificates) -> None:
    config = certificates / "client.toml"
    config.write_text(
        f'server = "{running.server.address}"\ndealer = "{running.dealer.address}"\n'
        f'certs = "{certificates / "bob"}"\nmax_tokens = 9\n'
    )
    command = [
        sys.executable,
        "-m",
        "mergec.runtime.cli",
        "generate",
        str(bundles),
        "--ids",
        "-p",
        "5 1 7",
    ]
    done = subprocess.run(
        [*command, "--config", str(config), "--max-tokens", "4"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(t) for t in decoder.plaintext(bundles, PROMPT, 4)]
    assert "4 steps" in done.stderr


def test_ctrl_c_ends_an_answer_after_the_step_under_way(
    running, bundles, ann, monkeypatch, capsys
) -> None:
    def press(text: str) -> None:
        sys.stdout.write(text)
        if text.strip():
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("mergec.runtime.cli.commands.answers.write", press)
    before = ended(running.server)
    places = ["--server", str(running.server.address), "--dealer", str(running.dealer.address)]
    asked = ["--ids", "-p", "5 1 7", "--max-tokens", "9", "--certs", str(ann.folder)]
    assert run(["generate", str(bundles), *places, *asked]) == INTERRUPTED
    printed = capsys.readouterr()
    assert printed.out.split() == [str(t) for t in decoder.plaintext(bundles, PROMPT, 1)]
    assert printed.err.splitlines()[-1] == "stopped"
    running.server.wait_for("session ended", before + 1)


def test_a_chat_keeps_its_turns_and_goes_on_after_a_mistake(
    running, bundles, certificates, tmp_path, monkeypatch, capsys
) -> None:
    words = list("abcdefghijklm")
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps({"chat_template": template}),
    }
    save_bundle(
        decoder.program("client", model="tiny"),
        tmp_path / "client",
        {f"tokenizer/{name}": text.encode() for name, text in files.items()},
    )
    said = iter(["f b h", "a " * 14, "c", ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    places = ["--server", str(running.server.address), "--dealer", str(running.dealer.address)]
    secured = ["--certs", str(certificates / "ann"), "--max-tokens", "3"]
    assert run(["chat", str(tmp_path), *places, *secured]) == 0
    printed = capsys.readouterr()
    first = decoder.plaintext(bundles, PROMPT, 3)
    second = decoder.plaintext(bundles, [*PROMPT, *first, 2], 3)
    expected = [" ".join(words[token] for token in turn) for turn in (first, second)]
    assert printed.out.splitlines() == expected
    assert "error: the prompt has 20 tokens, which with 3 to generate is more than" in printed.err


# ------------------------------------------------------------------- services of their own


def test_a_dealer_that_dies_ends_the_session_and_the_server_goes_on(bundles) -> None:
    with deployment(bundles, serve=TIMES) as made:
        connection = made.connection()
        answer = connection.generate(PROMPT, max_tokens=9)
        next(answer)
        for process in (*made.dealer.workers, made.dealer.process):
            process.kill()
        # The client hears it from the server, or notices it first.
        with pytest.raises(PartyError, match="the dealer went away"):
            list(answer)
        made.dealer.process.wait()
        with pytest.raises(PartyError, match="the dealer does not answer at"):
            made.connection(join_timeout=0.0).open()
        assert made.server.process.poll() is None
        assert {"session failed"} <= {line["event"] for line in made.server.log}


def test_sigterm_lets_an_answer_end_and_tells_the_idle(bundles) -> None:
    with deployment(bundles, serve=("--grace", str(START))) as made:
        idle, busy = made.connection(), made.connection()
        idle.open()
        answer = busy.generate(PROMPT, max_tokens=4)
        said = [next(answer).token]
        made.server.process.terminate()
        made.server.wait_for("session stopped")
        with pytest.raises(PartyError, match="the server says: it is shutting down"):
            tokens(idle)
        assert said + [token.token for token in answer] == decoder.plaintext(bundles, PROMPT, 4)
        assert made.server.process.wait() == 0
        with pytest.raises(PartyError, match="the server"):
            tokens(busy)
        assert made.dealer.stop(signal.SIGINT) == INTERRUPTED
        assert made.dealer.output.splitlines()[-1] == "stopped"
        assert made.dealer.log[-1]["event"] == "stopped"


@pytest.mark.slow
def test_an_answer_that_outlasts_the_grace_is_told(bundles) -> None:
    with deployment(bundles, serve=("--grace", "0.5")) as made:
        answer = made.connection().generate(PROMPT, max_tokens=4)
        next(answer)
        made.server.process.terminate()
        assert made.server.process.wait() == 0
        with pytest.raises(PartyError, match="the server says: it is shutting down"):
            list(answer)


class Child(Parent):
    """A session's connection to its parent, without the signal handlers."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line


@pytest.mark.parametrize("unread", [b"", b"a request"])
@pytest.mark.parametrize(
    ("use", "told"),
    [
        (lambda line: hear(line, "client"), "the client went away"),
        (lambda line: tell(line, "client", Kind.MARK), "the client went away"),
        (lambda line: Child(line).hear(), "the process that listens has ended"),
    ],
)
def test_a_process_that_finds_another_gone_says_so(use, told, unread) -> None:
    """Whether or not it had read its input, which causes different errors from the kernel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if unread:
        ours.send(unread)
    theirs.close()
    with pytest.raises(PartyError, match=told):
        use(ours)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_metrics_that_others_can_read_are_warned_of(host: str) -> None:
    said: list[tuple[str, str]] = []
    log = SimpleNamespace(
        info=lambda event, **_: said.append(("info", event)),
        warning=lambda event, reason, **_: said.append((event, reason)),
    )
    PartyMetrics("server").serve(Address(host, 0), log)
    warned = ("exposed without encryption", "whoever reaches it reads names of clients, lengths ")
    assert said[-1] == ("info", "serving metrics")
    assert [(event, reason[:51]) for event, reason in said[:-1]] == [warned] * (host == "0.0.0.0")


def test_both_parties_get_the_salt_of_their_session() -> None:
    told: list[list[dict[str, Any]]] = []
    desk = DealerDesk(4, Metrics("dealer"), 10.0)
    for token in ("one", "two"):
        told.append([])
        for pid, role in enumerate(("server", "client")):
            tell = lambda message, _: told[-1].append(message)  # noqa: E731
            worker = SimpleNamespace(pid=pid, tell=tell)
            desk.asked(worker, {"kind": "claim", "token": token, "role": role})
    salts = [[message["salt"] for message in session] for session in told]
    assert all(one == other for one, other in salts)
    assert len({*salts[0], *salts[1]}) == 2
    seeds = [seed for session in told for seed in session[0]["seeds"]]
    assert len({*seeds, *salts[0], *salts[1]}) == 6, "the salt is public, and no seed"


def test_a_client_gets_so_many_tokens_a_minute(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mergec.runtime.roles.rate_limit.time.monotonic", lambda: now[0])
    desk = ServerDesk(Limits(rate=60), PartyMetrics("server"))
    ann, bob = desk.allowance("ann"), desk.allowance("bob")
    ann.spend(90)  # an answer that has begun may end
    assert (ann.wait(), bob.wait()) == (31.0, 0.0)
    now[0] += 30.5
    assert desk.allowance("ann").wait() == 0.5
    now[0] += 1000
    ann.spend(60)
    assert ann.wait() == 1.0
    assert ServerDesk(Limits(), PartyMetrics("server")).allowance("ann").wait() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--listen", "nowhere"), "the address 'nowhere' is not of the form host:port"),
        (("--certs", "nothing"), "nothing/authority.pem: cannot be read"),
        (("--plaintext", "--listen", "0.0.0.0:0"), "--plaintext is for loopback; give --certs"),
        ((), "connections need certificates; give --certs DIR"),
        (("--plaintext", "--config", "none.toml"), "none.toml: cannot be read"),
        (("--plaintext", "--device", "cuda"), "there is no CUDA device here"),
    ],
)
def test_mistakes_at_the_start_are_one_line(bundles, options, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert run(["serve", str(bundles), *options]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert len(told.splitlines()) == 1


def test_a_port_in_use_and_a_wrong_option_in_a_file_are_one_line(bundles, tmp_path, capsys) -> None:
    config = tmp_path / "server.toml"
    config.write_text("sesions = 4\n")
    assert run(["serve", str(bundles), "--plaintext", "--config", str(config)]) == 1
    assert "unknown option 'sesions'; this command has: accept, bundle" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert run(["deal", str(bundles), "--plaintext", "--metrics", address]) == 1
        told = f"error: cannot listen at {address} (Address already in use); choose another"
        assert f"{told} --metrics" in capsys.readouterr().err
        with pytest.raises(PartyError, match="choose another --listen"):
            listen(Address.parse(address), Security("dealer", None, plaintext=True))
