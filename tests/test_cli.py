"""The command line: what it prints, how it fails, with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import onnx
import pytest

import mergec.compiler.cli as cli
from mergec.compiler.answer import Answer, Phase
from mergec.compiler.cli import CompileOptions
from mergec.compiler.config import CompileConfig
from mergec.compiler.program import Program
from mergec.runtime.cli import DEBUG, FAILED, INTERRUPTED, USAGE
from mergec.runtime.cli import run as mergec
from mergec.runtime.cli.commands.services import serve_command
from mergec.runtime.core.errors import PartyError
from mergec.runtime.core.spec import CHOICES, ROLES
from mergec.runtime.roles.rate_limit import DEFAULT_RATE
from tests.families import random_decoder
from tests.fixtures import decoder, greedy
from tests.roles import environment
from tests.test_program import TYPES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = Program({role: decoder(role) for role in ROLES}, TYPES)
    return program.save(tmp_path_factory.mktemp("cli") / "bundles")


@pytest.fixture
def bundles(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "bundles"))


Failed = Any


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Failed:
    monkeypatch.delenv(DEBUG, raising=False)

    def check(arguments: list[str], code: int, *words: str) -> None:
        assert mergec(arguments) == code
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if not line.endswith("…")]
        assert len(errors) == 1, printed.err
        assert errors[0].startswith("error: ")
        assert "Traceback" not in printed.err
        for word in words:
            assert word in errors[0]

    return check


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert mergec(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("compile", "inspect", "run", "demo"))
    assert mergec(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mergec ")


def test_the_bare_command_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert mergec([]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Usage: mergec")
    assert "compile" in printed.out
    assert not printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "frobnicate"),
        (["run"], "Missing"),
        (["run", "somewhere"], "--prompt"),
        (["run", "somewhere", "--prompt", "x", "--mode", "fast"], "'--mode': 'fast' is not one of"),
        (["run", "somewhere", "--prompt", "x", "--device", "tpu"], "--device"),
        (["run", "somewhere", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["run", "somewhere", "--prompt", "x", "--top-p", "2"], "--top-p"),
        (["run", "somewhere", "--prompt", "x", "--max-tokens", "0"], "--max-tokens"),
        (["run", "somewhere", "--prompt", "x", "--speed", "9"], "--speed"),
        (["compile", "smollm2"], "--output"),
        (["inspect", "x", "--new", "none"], "--new"),
    ],
)
def test_usage(fails: Failed, arguments: list[str], words: str) -> None:
    fails(arguments, USAGE, words, "mergec --help")


@pytest.mark.parametrize("noise", ["-0.001", "0.5", "some"])
def test_noise_out_of_range(fails: Failed, noise: str) -> None:
    given = ["compile", "smollm2", "-o", "somewhere", "--logit-noise", noise]
    fails(given, USAGE, "--logit-noise")


def test_no_noise_can_be_asked_for() -> None:
    """Zero is an option that was given, not one that was left out."""
    assert CompileOptions().given() == {}
    assert CompileOptions(logit_noise=0.0).given() == {"logit_noise": 0.0}
    assert CompileOptions(logit_noise=0.01, enable=["a"]).given() == {
        "logit_noise": 0.01,
        "enable": ("a",),
    }


def test_a_server_limits_the_rate_by_default() -> None:
    assert signature(serve_command).parameters["rate"].default == DEFAULT_RATE > 0


@pytest.mark.parametrize(("option", "values"), CHOICES.items())
def test_values_of_options(fails: Failed, option: str, values: tuple[str, ...]) -> None:
    given = ["compile", "smollm2", "-o", "somewhere", f"--{option}", "any"]
    fails(given, FAILED, f"{option} is 'any'; it can be: {', '.join(values)}")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: str) -> None:
        raise AssertionError("the model was loaded before the options were checked")

    monkeypatch.setattr("mergec.compiler.driver.load_model", load)


@pytest.mark.usefixtures("no_model")
def test_options_are_checked_before_the_model_is_loaded(fails: Failed, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    fails(["compile", "x", "-o", str(file)], FAILED, "exists and is not a mergec bundle")
    fails(["compile", "x", "-o", str(file / "new")], FAILED, "is not a folder")
    fails(["demo", "-o", str(file / "new")], FAILED, "is not a folder")
    new = str(tmp_path / "new")
    for option in ("--enable", "--disable"):
        fails(["compile", "x", "-o", new, option, "any"], FAILED, "unknown pass 'any'; there are:")
    both = ["--enable", "relu_activations", "--disable", "relu_activations"]
    fails(["compile", "x", "-o", new, *both], FAILED, "both enabled and disabled")
    fails(["inspect", "x", "--why-not", "any"], FAILED, "unknown pass 'any'; there are:")
    for option in ("--html", "--dot", "--onnx"):
        fails(["inspect", "x", option, str(file / "x")], FAILED, "is not a folder")
        fails(["inspect", "x", option, str(tmp_path)], FAILED, "it is a folder")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("no_model")
def test_a_folder_that_must_not_be_written(fails: Failed, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    fails(["compile", "x", "-o", str(tmp_path / "new")], FAILED, "no permission")
    fails(["inspect", "x", "--html", str(tmp_path / "x.html")], FAILED, "no permission")


def test_a_pass_that_runs_anyway_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "mergec.compiler.driver.load_model", lambda _: (random_decoder("llama").float(), None)
    )
    given = ["--enable", "fold_public", "--max-length", "16"]
    assert mergec(["compile", "x", "-o", str(tmp_path / "new"), *given]) == 0
    assert "the pass fold_public runs without being enabled" in capsys.readouterr().err


def test_bad_bundles(fails: Failed, bundles: Path, tmp_path: Path) -> None:
    run = ["run", str(bundles), "--prompt", "x"]
    fails(["run", str(tmp_path / "none"), "--prompt", "x"], FAILED, "no such bundle")
    tensors = bundles / "server" / "tensors.safetensors"
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-9])
    fails(run, FAILED, "tensors.safetensors", "cut or changed")
    tensors.write_bytes(data)
    shutil.rmtree(bundles / "server")
    shutil.copytree(bundles / "client", bundles / "server")
    fails(run, FAILED, "is the bundle of the client")
    one = str(bundles / "client")
    for command in (["run", one, "--prompt", "x"], ["inspect", one]):
        fails(command, FAILED, "is the bundle of one role")
    shutil.rmtree(bundles / "server")
    fails(run, FAILED, "server", "no such bundle")


def test_bad_prompts(fails: Failed, bundles: Path) -> None:
    fails(["run", str(bundles), "--prompt", "  "], FAILED, "empty")
    fails(["demo", "--prompt", "  "], FAILED, "empty")
    fails(["run", str(bundles), "--prompt", "hello"], FAILED, "tokenizer")


def test_compiling_onto_something_else(
    fails: Failed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_compile", lambda *_: Program({r: decoder(r) for r in ROLES}, TYPES))
    (tmp_path / "notes.txt").write_text("mine")
    with monkeypatch.context() as patched:
        # Before the model is compiled, which may take long.
        patched.setattr(cli, "_compile", None)
        fails(["compile", "x", "-o", str(tmp_path)], FAILED, "not a mergec bundle")
    assert mergec(["compile", "x", "-o", str(tmp_path / "new")]) == 0
    assert Program.stands_at(tmp_path / "new")


def test_passes_are_checked_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_(_: str, options: dict[str, Any], *__: Any, **___: Any) -> Program:
        asked.append(CompileConfig(**options).check_passes)
        return Program({role: decoder(role) for role in ROLES}, TYPES)

    monkeypatch.setattr(cli, "_compile", compile_)
    for option in ([], ["--check-passes"]):
        assert mergec(["compile", "x", "-o", str(tmp_path / "b"), *option]) == 0
        assert mergec(["inspect", "x", "--past", "4", *option]) == 0
    assert asked == [None, None, True, True]


def test_inspect(bundles: Path, capsys: pytest.CaptureFixture[str], fails: Failed) -> None:
    assert mergec(["inspect", str(bundles), "--json", "--past", "4"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["model"], data["past"]) == ("decoder", 4)
    assert mergec(["inspect", str(bundles), "--markdown", "--past", "4"]) == 0
    assert "| mpc.linear |" in capsys.readouterr().out
    assert mergec(["inspect", str(bundles), "--past", "4"]) == 0
    printed = capsys.readouterr().out
    assert "mpc.linear" in printed
    assert "share" in printed
    assert mergec(["inspect", str(bundles), "--graph", "--past", "4"]) == 0
    assert capsys.readouterr().out.startswith("%ids = input")
    fails(["inspect", str(bundles), "--past", "99"], FAILED, "more than the 16")
    assert mergec(["inspect", str(bundles), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["past"] == 15, "128 would not fit"
    fails(["inspect", str(bundles), "--new", "17"], FAILED, "more than the 16")
    fails(["inspect", str(bundles), "--new", "0"], FAILED, "must be at least 1")
    for option in (["--savings"], ["--stage", "before"]):
        fails(["inspect", str(bundles), "--past", "4", *option], FAILED, "the model itself")
    fails(["inspect", str(bundles), "--disable", "x"], FAILED, "already compiled")
    fails(["inspect", str(bundles), "--past", "4", "--why-not", "x"], FAILED, "unknown pass 'x'")
    shutil.rmtree(bundles / "server")
    assert mergec(["inspect", str(bundles), "--json", "--past", "4"]) == 0


def test_inspect_writes_files(bundles: Path, tmp_path: Path, fails: Failed, capsys: Any) -> None:
    html, dot, onnx_file = (tmp_path / f"graph.{kind}" for kind in ("html", "dot", "onnx"))
    files = ["--html", str(html), "--dot", str(dot), "--onnx", str(onnx_file)]
    assert mergec(["inspect", str(bundles), "--past", "4", *files]) == 0
    assert capsys.readouterr().out.split() == files[1::2]
    assert html.read_text().startswith("<!doctype html>")
    assert dot.read_text().startswith("digraph step {")
    onnx.checker.check_model(str(onnx_file))
    fails(["inspect", str(bundles), "--dot", str(tmp_path)], FAILED, "cannot be written")


def test_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip = {"node": "act", "module": "layers.1", "source": "m.py:3", "reason": "too wide"}
    entry = {
        "pass": "fuse_act", "summary": "", "exact": True, "sites": 0,
        "nodes_before": 9, "nodes_after": 9, "skips": [skip],
    }  # fmt: skip
    roles = {
        role: decoder(role, passes=[entry], left_out={"quad": "it is lossy"}) for role in ROLES
    }
    path = str(Program(roles, TYPES).save(tmp_path / "bundles"))
    why_not = ["inspect", path, "--past", "4", "--why-not"]
    assert mergec([*why_not, "fuse_act", "--markdown"]) == 0
    assert "| act | layers.1 | m.py:3 | too wide |" in capsys.readouterr().out
    assert mergec([*why_not, "quad"]) == 0
    assert capsys.readouterr().out.strip() == "quad did not run: it is lossy"


def test_compile_says_how_far_a_lossy_program_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    deviation = {"places": 16, "agreed": 3, "worst": 37.25, "mean": 6.5, "spread": 4.0}
    told = "next token is the model's at 3 of 16 places, and logits are 6.5 apart in the mean"

    def compiled(**manifest: Any) -> Program:
        return Program({role: decoder(role, **manifest) for role in ROLES}, TYPES)

    monkeypatch.setattr(cli, "_compile", lambda *_: compiled(lossy=True, deviation=deviation))
    path = str(tmp_path / "lossy")
    assert mergec(["compile", "x", "-o", path]) == 0
    said = capsys.readouterr().err
    assert "does not compute what the model does" in said
    assert told in said
    assert mergec(["inspect", path, "--past", "4", "--markdown"]) == 0
    assert told in capsys.readouterr().out
    monkeypatch.setattr(cli, "_compile", lambda *_: compiled())
    assert mergec(["compile", "x", "-o", str(tmp_path / "exact")]) == 0
    assert "lossy" not in capsys.readouterr().err


def test_run_prints_answer_summary_and_plaintext(
    bundles: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = greedy([3], 4)

    def generate(self: Program, prompt: str, **options: Any) -> Answer:
        options["on_text"]("to ")
        options["on_text"]("be")
        phases = {
            "setup": Phase(0, 9.0, 7, 3000, 80),
            "prompt": Phase(1, 2.0, 40, 5_000_000, 70),
            "decode": Phase(3, 3.0, 90, 900, 0),
        }
        return Answer("to be", [3], tokens, phases=phases, peak_memory={"client": 10**9})

    monkeypatch.setattr(Program, "generate_local", generate)
    assert mergec(["run", str(bundles), "--prompt", "hi", "--check-plaintext"]) == 0
    printed = capsys.readouterr().out
    assert "> hi" in printed
    assert "to be\n" in printed
    for cell in ("2.00", "5.0 MB", "1.00", "300 B", "30", "client 1.0 GB"):
        assert cell in printed
    assert "setup, once per session: 9.00 s, 3,000 B online, 7 rounds, 80 B offline" in printed
    assert "all 4 tokens are the same" in printed


def test_other_failures(
    fails: Failed, bundles: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = ["run", str(bundles), "--prompt", "hi"]

    def failing(error: BaseException) -> None:
        def generate(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(Program, "generate_local", generate)

    failing(PartyError("the server went away; start it again"))
    fails(run, FAILED, "the server went away")
    failing(ZeroDivisionError("a\nb"))
    fails(run, FAILED, "internal error: ZeroDivisionError: a b", DEBUG)
    failing(ModuleNotFoundError("No module named 'gguf'", name="gguf"))
    fails(run, FAILED, "'gguf'", "mergec[compile]")
    failing(KeyboardInterrupt())
    assert mergec(run) == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    monkeypatch.setenv(DEBUG, "1")
    failing(PartyError("gone"))
    assert mergec(run) == FAILED
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly(bundles: Path) -> None:
    command = f"{sys.executable} -m mergec inspect {bundles} --graph --past 1 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "rror" not in done.stderr


MISSING = """
import contextlib, io, json, sys

packages, commands = map(json.loads, sys.argv[1:])

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from mergec.compiler.cli import main

told = []
for command in commands:
    sys.argv = ["mergec", *command]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as end:
            told.append((end.code, said.getvalue()))
print(json.dumps(told))
"""
"""A machine on which some packages are not installed: what commands say there."""


@pytest.mark.parametrize(
    ("packages", "commands"),
    [
        pytest.param(
            ("transformers", "gguf", "accelerate", "onnx", "fast_sugiyama"),
            {
                "compile {model} -o {folder}/new": "compile",
                "inspect {model}": "compile",
                "demo -o {folder}/new": "compile",
                "inspect {bundles} --past 1 --onnx {folder}/graph.onnx": "compile",
                "run {bundles} --prompt x": "",
            },
            marks=pytest.mark.slow,
        ),
        (
            ("fastapi", "uvicorn", "starlette", "pydantic"),
            {"proxy {bundles} --plaintext": "proxy"},
        ),
    ],
)
def test_what_only_some_need_is_named_with_its_extra(
    bundles: Path, tmp_path: Path, packages: tuple[str, ...], commands: dict[str, str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    given = [
        [word.format(model=model, folder=tmp_path, bundles=bundles) for word in command.split()]
        for command in commands
    ]
    done = subprocess.run(
        [sys.executable, "-c", MISSING, json.dumps(packages), json.dumps(given)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for (code, said), extra in zip(told, commands.values(), strict=True):
        assert code == FAILED
        (line,) = [text for text in said.splitlines() if not text.endswith("…")]
        expected = f"run `pip install 'mergec[{extra}]'`" if extra else "compile with a tokenizer"
        assert line.startswith("error: ")
        assert line.endswith(expected)


def test_the_party_has_its_commands_alone() -> None:
    code = "import sys; from mergec.runtime.cli import run; run(['--help']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    *lines, modules = done.stdout.splitlines()
    commands = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line]
    assert commands == [
        "doctor", "audit", "serve", "deal", "prepare", "generate", "chat", "proxy", "certs",
        "datastore",
    ]  # fmt: skip
    assert not set(modules.split()) & {"mergec.compiler", "mergec.passes", "torch"}


def test_an_option_in_a_file_gives_way_to_the_command_line(
    fails: Failed, bundles: Path, tmp_path: Path
) -> None:
    file = tmp_path / "options.toml"
    file.write_text('plaintext = true\nserver = "nowhere"\ntimeout = 3.0\n')
    asked = ["generate", str(bundles), "--ids", "-p", "1", "--config", str(file)]
    fails(asked, FAILED, "the address 'nowhere'")
    fails([*asked, "--server", "anywhere"], FAILED, "the address 'anywhere'")
    file.write_text('config = "other.toml"\n')
    fails(asked, FAILED, "unknown option 'config'; this command has: accept, bundle, certs, chat,")
