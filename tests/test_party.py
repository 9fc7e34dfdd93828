"""The roles as processes: a whole run, and every way in which one can go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import role_path
from runtime.errors import BundleError, PartyError, PromptError
from runtime.local import run_local
from runtime.party import play
from tests import decoder
from tests.roles import ROOT, Finished, environment, finish, free_port

PROMPT = [5, 1, 7]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program whose third token after PROMPT ends the answer."""
    place = tmp_path_factory.mktemp("bundles")
    expected = decoder.plaintext(decoder.save(place / "endless"), PROMPT, 3)
    assert expected[2] not in expected[:2]
    return decoder.save(place / "program", stop_tokens=[expected[2]])


@pytest.mark.parametrize("mode", ["mergec", "crypten"])
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


@pytest.mark.parametrize("victim", ["dealer", "client"])
def test_a_killed_role_ends_the_run_with_its_name(bundles: Path, victim: str) -> None:
    pids: dict[str, int] = {}

    def kill(role: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "loaded":
            pids[role] = event["pid"]
        if event["event"] == "token":
            os.kill(pids[victim], signal.SIGKILL)

    with pytest.raises(PartyError, match=f"the {victim} was ended by SIGKILL") as caught:
        run_local(bundles, PROMPT, max_tokens=12, on_event=kill)
    assert "\n" not in str(caught.value)
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_bundles_of_different_programs_are_named(tmp_path: Path, bundles: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for role in ("client", "dealer"):
        role_path(mixed, role).symlink_to(role_path(bundles, role))
    other = decoder.save(tmp_path / "other", fractional_bits=15)
    role_path(mixed, "server").symlink_to(role_path(other, "server"))
    with pytest.raises(
        PartyError, match=r"computes with 1\d fractional bits.*bundles of one compilation"
    ):
        run_local(mixed, PROMPT, max_tokens=3)


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
    monkeypatch.setattr("runtime.local.subprocess.Popen", lambda *args, **_: started.append(args))
    with pytest.raises(PromptError, match=message):
        run_local(bundles, prompt, **options)
    assert not started


def test_missing_bundles_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        run_local(tmp_path / "nothing", [1], max_tokens=1)


# ------------------------------------------------------------------------------- command line


def launch(role: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "runtime.party", "--role", role, *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_one_line(result: Finished, message: str) -> None:
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code not in (0, None), result
    assert len(errors) == 1, result
    assert message in errors[0], result
    assert "Traceback" not in result.err


def test_a_role_by_hand_and_a_role_that_never_comes(bundles: Path) -> None:
    common = ("--bundle", str(bundles), "--join-timeout", "15")
    at = ("--rendezvous", f"tcp://127.0.0.1:{free_port()}")
    client = launch("client", *common, *at, "--prompt-ids", "5 1 7", "--max-tokens", "3")
    server = launch("server", *common, *at)
    told = finish(client)
    assert_one_line(told, "the dealer did not join within 15 s; start it with `python -m runtime")
    assert_one_line(finish(server), "the dealer")
    assert told.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--role", "client"], "the client needs a prompt; give --prompt"),
        (["--role", "client", "--prompt-ids", "1,x"], "takes whole numbers"),
        (["--role", "client", "--prompt-ids", "1,40"], "token 40 is not in the vocabulary"),
        (["--role", "client", "--prompt-ids", ""], "the prompt is empty"),
        (["--role", "client", "--prompt", "hello"], "compile with a tokenizer"),
        (["--role", "client", "--prompt-ids", "1", "--top-k", "-3"], "top-k must be"),
        (["--role", "server", "--rendezvous", "127.0.0.1:1"], "is not of the form tcp://"),
        (["--role", "server", "--insecure-first-party"], "is for --mode crypten only"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    bundles: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code = play([*arguments, "--bundle", str(bundles), "--max-tokens", "3"])
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in told


def test_wrong_bundles_and_options_are_one_line(
    bundles: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert play(["--role", "server", "--bundle", str(bundles / "client")]) == 1
    assert "is the bundle of the client" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert play(["--role", "server", "--bundle", str(bundles), "--device", "cuda"]) == 1
    assert "no CUDA device here" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        play(["--role", "server", "--bundle", str(bundles), "--mode", "fast"])
    assert caught.value.code == 2
    assert "invalid choice: 'fast'" in capsys.readouterr().err


def test_errors_can_be_read_by_programs(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert play(["--role", "client", "--bundle", str(bundles), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["event"], told["kind"]) == ("error", "PromptError")


def test_the_insecure_provider_warns_loudly(
    bundles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--mode", "crypten", "--insecure-first-party", "--rendezvous", "nowhere"]
    assert play(["--role", "server", "--bundle", str(bundles), *arguments]) == 1
    assert "no security at all" in capsys.readouterr().err


def test_a_party_needs_nothing_of_the_compiler() -> None:
    code = (
        "import sys, runtime.party, runtime.local, runtime.stock, runtime.transport.link\n"
        "found = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(found & {'compiler', 'passes', 'transformers'}))\n"
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
    assert done.stdout.splitlines() == ["[]", "True"]
    assert done.stderr == ""


def test_crypten_is_imported_only_when_it_is_used() -> None:
    code = (
        "import sys, runtime.party, runtime.local, runtime.op\n"
        "runtime.op.load_all()\n"
        "print('crypten' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
