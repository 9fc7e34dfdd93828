"""`make gpu-check` without a GPU: what it does where a part fails, hangs, or does not compile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mergec.runtime.kernels.backends import KERNELS, Kernel
from tests.kernels import cases
from tests.roles import ROOT
from tests.services import wait_until


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    return gpu_check


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
    assert set(gpu_check.LIMITS) == set(gpu_check.PARTS)
    assert sum(gpu_check.LIMITS.values()) <= 475
    assert gpu_check.LIMITS["kernels"] > gpu_check.KERNELS_LIMIT
    assert set(cases.CASES) == set(KERNELS)


def test_rates_are_those_of_calls_that_kernels_take(gpu_check: Any) -> None:
    found = [seen.text for seen in gpu_check.rates_on(torch.device("cpu"), 1 << 16)]
    begun = (
        "copy: ", "1 rows times 4 x", "64 rows", "256 rows", "scores of a token with 2 cached",
        "4,096 truncations", "AES-256 stream", "trees of 128", "tables for the server",
    )  # fmt: skip
    assert len(found) == len(begun)
    assert all(text.startswith(what) for text, what in zip(found, begun, strict=True))


@pytest.mark.slow
def test_steps_are_measured_and_profiled(gpu_check: Any) -> None:
    import bench

    model, tokens = bench._random(
        "llama", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    found = [seen.text for seen in gpu_check._steps(model, tokens, (5, 3), "cpu")]
    begun = (
        "compiled in", "prompt of 5", "decode after 5", "prompt of 3", "decode after 3",
        "a decode step under the profiler", "0.000 s of it in 0 kernels", "0.000 s of it in 0",
    )  # fmt: skip
    assert all(text.startswith(what) for text, what in zip(found, begun, strict=False))
    assert found[-1] == "memory of all three roles on the device: 0.0 GB"


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
