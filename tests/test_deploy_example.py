"""The deployment example runs unchanged, and its search of the traffic finds planted secrets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests import decoder
from tests.roles import environment

EXAMPLE = Path(__file__).parents[1] / "examples" / "deploy"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import traces

    return traces


def test_traces_are_found_wherever_they_are(
    traces: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "_CHUNK", 1000)
    file = tmp_path / "1.up"
    noise = np.random.default_rng(0).bytes(5000)
    bundles = decoder.save(tmp_path / "bundles", fractional_bits=16)
    rows = traces.weight_traces(bundles / "server")
    held = decoder.weights()
    assert held["embed.weight"][3, : traces.SHOWN].numpy().tobytes() in rows
    count = sum(tensor.reshape(-1, decoder.WIDTH).shape[0] for tensor in held.values())
    assert len(rows) == 2 * count - 1, "a bias is not in a product, so it has no words"
    texts = traces.text_traces("what is it", [3, 1, 4])
    assert set(texts) == {"text"} | {
        f"token numbers as {kind}" for kind in ("<u8", ">u8", "<u4", ">u4")
    }, "three 16-bit numbers and '3, 1, 4' are too short to be told from chance"
    file.write_bytes(b"")
    assert not list(traces.search(file, texts, rows))
    file.write_bytes(noise)
    assert not list(traces.search(file, texts, rows))
    for number, row in enumerate(sorted(rows)):
        at = 990 + number % 20  # around the end of the first part
        file.write_bytes(noise[:at] + row + noise[at:])
        assert f"1.up: a weight's row at byte {at}" in list(traces.search(file, texts, rows))
    for what, trace in texts.items():
        file.write_bytes(noise + trace)
        assert list(traces.search(file, texts, rows)) == [f"1.up: {what}"]


@pytest.mark.slow
def test_three_machines(tmp_path: Path) -> None:
    """Without TLS, so only the protocols hide prompt, answers and weights."""
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLE / "three_machines.py"), "--plaintext"),
            *("--tokens", "3", "--folder", str(tmp_path / "made")),
        ],
        env={**environment(), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[0].endswith("client 127.0.0.2, server 127.0.0.3, dealer 127.0.0.4, wire 127.0.0.5.")
    assert said[-2:] == ["Nothing of them was there.", "The program's public hash was there."]
    assert "The answer without the dealer is the same." in said
    back = {
        line.split(": ")[0]: int(line.split(" to the server, ")[1].split()[0].replace(",", ""))
        for line in said
        if " to the server, " in line
    }
    assert back["The chat, weights kept"] < back["The first answer"]
    # The parties of a stored answer also compare their journals.
    assert back["The first answer"] < back["The stored answer"] < back["The first answer"] + 200
    assert [line for line in said if "stopped" in line] == [
        f"[{role}] stopped, exit code 0" for role in ("dealer", "server")
    ]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make network namespaces")
def test_three_machines_in_namespaces(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "three_machines.py"), "--folder", str(tmp_path / "made")],
        env={**environment(), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    if not said[0].startswith("The machines are network namespaces"):
        pytest.skip(said[0])
    assert said[-1] == "The program's public hash was not there."
