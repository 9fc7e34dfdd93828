"""The roles as processes: a whole run, and every way in which one can go wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergec.runtime.core.device import check_device
from mergec.runtime.core.errors import BundleError, MergecError, PartyError, PromptError
from mergec.runtime.core.spec import CLIENT, ROLES, SERVER
from mergec.runtime.program.bundle import read_manifest, role_path
from mergec.runtime.roles.local import run_local
from mergec.runtime.roles.party import Options, deal, greet, play
from mergec.runtime.session.handshake import receive_origin
from mergec.runtime.session.hello import Hello
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.lines import Lines, take
from tests import decoder
from tests.roles import ROOT, environment, finish

PROMPT = [5, 1, 7]
ENDLESS = 2**20 - len(PROMPT)
"""Tokens."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program whose third token after PROMPT ends the answer."""
    place = tmp_path_factory.mktemp("bundles")
    expected = decoder.plaintext(decoder.save(place / "endless"), PROMPT, 3)
    assert expected[2] not in expected[:2]
    return decoder.save(place / "program", stop_tokens=[expected[2]])


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program whose ENDLESS answer lasts until a test ends it, however late that is."""
    return decoder.save(tmp_path_factory.mktemp("endless"), max_length=2**20)


@pytest.mark.parametrize("mode", ["mergec", pytest.param("crypten", marks=pytest.mark.slow)])
def test_three_processes_say_what_plaintext_says(bundles: Path, mode: str) -> None:
    streamed: list[int] = []
    result = run_local(bundles, PROMPT, max_tokens=6, mode=mode, on_token=streamed.append)
    assert result.tokens == streamed == decoder.plaintext(bundles, PROMPT, 3)
    assert [(r.phase, r.new, r.past) for r in result.records] == [
        ("prompt", 3, 0),
        ("decode", 1, 3),
        ("decode", 1, 4),
    ]
    for record in result.records:
        assert record.seconds > 0
        assert min(record.rounds, record.sent, record.received, record.offline_bytes) > 0
    assert result.setup is not None
    assert set(result.peak_memory) == {"client", "server", "dealer"}
    assert min(result.peak_memory.values()) > 10**7


@pytest.mark.parametrize("victim", ["dealer", pytest.param("client", marks=pytest.mark.slow)])
def test_a_killed_role_ends_the_run_with_its_name(endless: Path, victim: str) -> None:
    pids: dict[str, int] = {}
    killed: list[str] = []

    def kill(role: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "loaded":
            pids[role] = event["pid"]
        if event["event"] == "token" and victim not in killed:
            killed.append(victim)
            os.kill(pids[victim], signal.SIGKILL)

    with pytest.raises(PartyError, match=f"the {victim} was ended by SIGKILL") as caught:
        run_local(endless, PROMPT, max_tokens=ENDLESS, on_event=kill)
    assert "\n" not in str(caught.value)
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {"max_tokens": 3}, "the prompt is empty"),
        ([1, 99], {"max_tokens": 3}, "token 99 is not in the vocabulary of 13"),
        ([1] * 14, {"max_tokens": 3}, "which with 3 to generate is more than"),
        ([1], {"temperature": -1.0}, "temperature must be"),
        ([1], {"top_p": 2.0}, "top-p must be"),
    ],
)
def test_bad_requests_start_nothing(
    bundles: Path, prompt: list[int], options: dict[str, Any], message: str, monkeypatch: Any
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        "mergec.runtime.roles.local.subprocess.Popen", lambda *args, **_: started.append(args)
    )
    with pytest.raises(PromptError, match=message):
        run_local(bundles, prompt, **options)
    assert not started


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("x", "there is no device 'x'"),
        ("meta", "there is no device 'meta'"),
        ("cuda", "no CUDA device here"),
        ("cuda:1", "no CUDA device here"),
    ],
)
def test_a_device_that_is_not_there_starts_nothing(
    bundles: Path, device: str, message: str, monkeypatch: Any
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        "mergec.runtime.roles.local.subprocess.Popen", lambda *args, **_: started.append(args)
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(MergecError, match=message):
        run_local(bundles, PROMPT, max_tokens=1, device=device)
    assert not started


def test_the_first_devices_are_those_there_are(monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1"):
        check_device(device)
    with pytest.raises(MergecError, match="no device 'cuda:2' here, only the first 2 of its kind"):
        check_device("cuda:2")


def test_missing_bundles_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        run_local(tmp_path / "nothing", [1], max_tokens=1)


def test_the_insecure_provider_is_for_stock_protocols(bundles: Path) -> None:
    with pytest.raises(MergecError, match="is for mode crypten only"):
        run_local(bundles, PROMPT, max_tokens=1, insecure_first_party=True)


@pytest.mark.slow
def test_the_insecure_provider_warns_loudly(
    bundles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_local(bundles, PROMPT, max_tokens=1, mode="crypten", insecure_first_party=True)
    assert result.tokens == decoder.plaintext(bundles, PROMPT, 1)
    assert result.records[0].offline_bytes == 0
    assert "no security at all" in capsys.readouterr().err


# ------------------------------------------------------------------------------- one role alone


def told(capsys: pytest.CaptureFixture[str], **fields: Any) -> tuple[str, str]:
    """Kind and message of the error that a role ends with, before it needs the others."""
    with Lines() as lines:
        # The role closes what it was given.
        given = [os.dup(descriptor) for descriptor in lines.of(fields["role"])]
        assert play(Options(lines=given, **fields).json()) == 1
    *_, last = capsys.readouterr().out.splitlines()
    event = json.loads(last)
    assert event["event"] == "error"
    assert "\n" not in event["message"]
    return event["kind"], event["message"]


def test_wrong_bundles_and_options_are_told_in_one_line(
    bundles: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, message = told(capsys, role="server", bundle=str(bundles / "client"))
    assert kind == "BundleError"
    assert "is the bundle of the client" in message
    kind, message = told(capsys, role="client", bundle=str(bundles / "client"))
    assert kind == "PromptError"
    assert "the prompt is empty" in message
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    server = str(bundles / "server")
    assert "no CUDA device here" in told(capsys, role="server", bundle=server, device="cuda")[1]


def met(places: Mapping[str, tuple[Path, str]]) -> dict[str, str]:
    """What each role ends with that has this bundle and mode, when it meets the others."""
    said: dict[str, str] = {}

    def meet(role: str, channels: dict[int, Channel]) -> None:
        bundle, mode = places[role]
        options = Options(role, str(bundle), (), mode, join_timeout=60.0)
        try:
            greet(channels, Hello.of(role, read_manifest(bundle, role), mode), options)
        except PartyError as error:
            said[role] = str(error)

    with Lines() as lines:
        threads = [
            threading.Thread(target=meet, args=(role, take(role, given)))
            for role in ROLES
            for given in [[os.dup(descriptor) for descriptor in lines.of(role)]]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return said


def test_roles_of_different_modes_say_so_before_anything_is_sent(bundles: Path) -> None:
    """In threads: each compares what the two others say of themselves."""
    modes = zip(ROLES, ("mergec", "crypten", "mergec"), strict=True)
    said = met({role: (role_path(bundles, role), mode) for role, mode in modes})
    assert "the server runs in mode crypten" in said["client"]
    assert "the server runs in mode crypten" in said["dealer"]
    assert "runs in mode mergec, this party in mode crypten" in said["server"]


def test_bundles_of_different_programs_are_named(tmp_path: Path, bundles: Path) -> None:
    other = decoder.save(tmp_path / "other", fractional_bits=15)
    places = {"client": bundles, "server": other, "dealer": bundles}
    said = met({role: (role_path(place, role), "mergec") for role, place in places.items()})
    told = r"computes with 1\d fractional bits.*bundles of one compilation"
    assert all(re.search(told, said[role]) for role in ROLES), said


@pytest.mark.slow
def test_a_silent_party_is_named_after_the_timeout(endless: Path) -> None:
    """The server is stopped, not ended: its connections stay open."""
    stopped: list[int] = []

    def stop(role: str, event: Mapping[str, Any]) -> None:
        if (role, event["event"]) == ("server", "loaded"):
            stopped.append(event["pid"])
        if (role, event["event"]) == ("client", "token") and len(stopped) == 1:
            os.kill(stopped[0], signal.SIGSTOP)
            stopped.append(0)

    with pytest.raises(PartyError, match=r"the \w+ sent nothing for 8 s"):
        run_local(endless, PROMPT, max_tokens=ENDLESS, timeout=8.0, on_event=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(stopped[0], 0)


def test_the_error_of_a_run_is_that_of_the_role_nearest_to_the_cause(
    bundles: Path, tmp_path: Path
) -> None:
    """The server finds its bundle damaged; the others only lose it."""
    place = shutil.copytree(bundles, tmp_path / "damaged")
    tensors = max(role_path(place, "server").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(BundleError, match="damaged"):
        run_local(place, PROMPT, max_tokens=2)


@pytest.mark.slow
def test_ctrl_c_ends_all_roles(endless: Path) -> None:
    """The signal goes to the whole group, as from a terminal."""
    code = (
        "from mergec.runtime.roles.local import run_local\n"
        f"run_local({str(endless)!r}, {PROMPT}, max_tokens={ENDLESS},\n"
        "          on_event=lambda role, event: print(event.get('pid', 0), flush=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    pids: list[int] = []
    while len(pids) < 3:
        pids += [pid for pid in [int(process.stdout.readline())] if pid]
    os.killpg(process.pid, signal.SIGINT)
    result = finish(process)
    assert "KeyboardInterrupt" in result.err
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_party_needs_no_compiler_and_crypten_only_where_it_is_used() -> None:
    """Neither ours nor torch's, which torch would load where it computes a shape."""
    code = (
        "import sys, mergec.runtime.roles.party\n"
        "from mergec.runtime.core.meta import compute_shapes_alone\n"
        "from mergec.runtime.core.spec import CLIENT, ROLES, SERVER\n"
        "from mergec.runtime.roles.inprocess import InProcessSession\n"
        "from tests import decoder\n"
        "compute_shapes_alone()\n"
        "with InProcessSession({role: decoder.program(role) for role in ROLES}) as session:\n"
        "    session.step([5, 1, 7], 0)\n"
        "print(sorted({'torch._dynamo', 'crypten'} & {*sys.modules}))\n"
        "import mergec.runtime.engine.stock\n"
        "found = set(sys.modules)\n"
        "print(sorted(found & {'mergec.compiler', 'mergec.passes', 'transformers'}))\n"
        "print('crypten' in found)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["[]", "[]", "True"]
    assert done.stderr == ""


def dealt_origins(**options: Any) -> list[tuple[bytes, bytes]]:
    """The seeds and salts that a dealer tells the parties."""
    pairs = {party: socket.socketpair() for party in (CLIENT, SERVER)}
    channels = {party: Channel(ours, ROLES[party]) for party, (ours, _) in pairs.items()}
    _, streams = deal(decoder.program("dealer"), channels, **options)
    found = []
    for _, theirs in pairs.values():
        origin = receive_origin(Channel(theirs, "dealer"))
        found.append((origin.seed, origin.salt))
    for stream in streams:
        stream.abandon()
    return found


def test_given_seeds_repeat_a_session_with_its_salt() -> None:
    """What keys share depends on the salt, and with that how results are rounded."""
    seeds = bytes(range(32)), bytes(range(1, 33))
    first, again, fresh = dealt_origins(seeds=seeds), dealt_origins(seeds=seeds), dealt_origins()
    assert first == again
    assert tuple(seed for seed, _ in first) == seeds
    assert len({salt for _, salt in first + fresh}) == 2
