"""The benchmark on a small decoder: rows are kept, failures reported, runs resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergec import compile_decoder
from mergec.runtime.core.spec import ROLES
from tests.families import random_decoder
from tests.fixtures import tiny
from tests.roles import ROOT

FAILING_ROLE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
job, role = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
if role == "client":
    save_file({"value": torch.ones(3)}, Path(job["folder"]) / "0.out")
keys = "seconds online_seconds processor_seconds rounds online offline peak".split()
print(json.dumps({"event": "step", **dict.fromkeys(keys, 7)}), flush=True)
if role == "server":
    sys.exit("no memory left")
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench

    return bench


def small_plan(bench: Any, *settings: Any) -> Any:
    def load() -> Any:
        return bench._random(
            "gpt2", vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=256
        )

    return bench.Plan({"tiny": load}, settings, ((1, 16), (4, 0)))


@pytest.mark.slow
def test_rows_are_written_and_only_what_failed_is_tried_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(bench, bench.Setting("no-such-preset", "shared"), bench.EXACT)
    first = bench.Bench(plan, tmp_path, resume=False)
    first.run()
    rows = json.loads((tmp_path / "latest.json").read_text())
    assert [row["failed"] != "" for row in rows] == [True, True, False, False]
    assert "no-such-preset" in rows[0]["failed"]
    assert rows[0]["seconds"] is None
    assert all(row["online_bytes"] > 0 and row["peak_memory_bytes"] > 0 for row in rows[2:])
    assert all(row["worst_logit_error"] < 0.02 for row in rows[2:])
    assert all(row["offline_seconds"] > 0 for row in rows[2:])
    assert [row["online_seconds"] is None for row in rows[2:]] == [False, True]

    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("these rows are there already"))
    second = bench.Bench(plan, tmp_path, resume=True)
    second.run()
    assert [row.json() for row in second.rows] == rows
    text = bench.markdown(second.rows, [], bench.machine())
    assert "failed: CompileError: " in text
    assert "decode after 16" in text

    (tmp_path / "machine.json").write_text("{}")
    with pytest.raises(SystemExit, match="another machine"):
        bench.Bench(plan, tmp_path, resume=True)


@pytest.mark.slow
def test_a_role_that_fails_ends_its_run_alone(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import harness

    script = tmp_path / "role.py"
    script.write_text(FAILING_ROLE)
    monkeypatch.setattr(harness, "ROLE", script)
    monkeypatch.setattr(harness, "_GRACE", 0.5)
    inputs = {"ids": torch.tensor([[1]]), "cache": torch.zeros(1, 1, 0, 8)}
    steps = [harness.Step(inputs)] * 2
    with pytest.raises(harness.RunError, match="server ended with code 1: no memory left") as found:
        harness.run({role: tiny(role) for role in ROLES}, steps, "mergec")
    (taken,) = found.value.taken
    assert (taken.rounds, taken.offline, taken.value.tolist()) == (7, 14, [1.0, 1.0, 1.0])


@pytest.mark.slow
def test_a_program_that_was_compiled_with_a_tokenizer_runs_without_it(bench: Any) -> None:
    import harness

    model = random_decoder("llama").float()
    program = compile_decoder(model)
    steps = bench.steps_of(program, [5, 9, 2], [(1, 2)], 1)
    for role in program.roles.values():
        role.manifest = replace(role.manifest, tokenizer="5" * 64)
    (taken,) = harness.run(program.roles, steps, "mergec")
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 2]])).logits[0, -1:]
    assert (taken.value.reshape(logits.shape) - logits).abs().max() < 0.03
    assert {role.manifest.tokenizer for role in program.roles.values()} == {"5" * 64}


@pytest.mark.slow
def test_the_baseline_is_extrapolated_but_not_its_memory(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STOCK_LAYERS", (1, 2))
    installed = bench.replace(bench.INSTALLED, shapes=((1, 16),))
    plan = small_plan(bench, bench.BASELINE, installed, bench.MERGE, bench.EXACT)
    run = bench.Bench(plan, tmp_path, resume=False)
    run.run()
    assert not any(row.failed for row in run.rows)
    stock, over_gloo, exact = run.rows[0], run.rows[2], run.rows[-2]
    assert (over_gloo.preset, over_gloo.rounds) == ("crypten-gloo", 0)
    assert over_gloo.seconds > 0
    assert (stock.preset, stock.extrapolated_from_layers) == ("crypten", 2)
    assert stock.online_seconds is stock.offline_seconds is None
    assert stock.peak_memory_bytes is None
    assert stock.online_bytes > 20 * exact.online_bytes
    bench.plots(
        [bench.replace(row, past=128) for row in run.rows if row.phase == "decode"], tmp_path
    )
    assert (tmp_path / "seconds.png").exists()
    assert "| crypten | shared |" in bench.markdown(run.rows, [], bench.machine())


@pytest.mark.slow
def test_the_small_form_from_the_command_line(bench: Any, tmp_path: Path) -> None:
    bench.main(["--small", "--results", str(tmp_path)])
    text = (tmp_path / "side-by-side.md").read_text()
    assert text.count("| crypten | shared |") == text.count("| exact | server |") == 4
    assert "failed" not in text


def test_a_nonlinearity_on_its_own(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import elementwise  # type: ignore[import-not-found]

    monkeypatch.setattr(elementwise, "CASES", (("exp", (), (1, 64), -12.0, 0.0),))
    monkeypatch.setattr(elementwise, "COUNT", 64)
    monkeypatch.setattr(elementwise, "MODES", ("mergec",))
    (row,) = elementwise.main(tmp_path)
    assert row.rounds == 3
    assert 0 < row.largest_error < 1e-4
    assert elementwise.main(tmp_path, resume=True) == [row], "what is measured stays"
    assert "| exp | mergec | 3 |" in (tmp_path / "elementwise.md").read_text()
