"""The comparison with SPU, without SPU: ratios, tables, logs, and processes that fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.roles import ROOT

LOG = """[info] [api.cc:172] [Profiling] SPU execution step completed, total time 2.2s.
[info] [api.cc:223] - pphlo.dot, executed 10 times, duration 1.1s, send bytes 42 recv bytes 42, \
send actions 20, recv actions 20
[info] [api.cc:233] Link details: total send bytes 900, recv bytes 800, send actions 7, recv \
actions 6
[info] [api.cc:233] Link details: total send bytes 500, recv bytes 400, send actions 5, recv \
actions 4
"""

PARTY = """
import json, sys
from pathlib import Path
import numpy as np
job, what = Path(sys.argv[1]), sys.argv[2]
folder, options = job.parent, json.loads(job.read_text())
if what == "collect":
    np.save(folder / "logits.npy", np.load(folder / options["weights_file"])["wte"][0])
elif what != "prepare":
    rank = int(what)
    print(f"Link details: total send bytes 9, recv bytes 9, send actions 9, recv actions 9")
    print(f"Link details: total send bytes {100 + rank}, recv bytes 0, send actions {3 + rank}, .")
    seconds = [1.0 + rank] * options["repeats"]
    (folder / f"seconds-{rank}.json").write_text(json.dumps({"seconds": seconds}))
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    return peers


@pytest.fixture
def measured(peers: Any) -> Any:
    def make(seconds: float, **options: Any) -> Any:
        return peers.Measured(**({"seconds": seconds, "online": 4_000_000, "sends": 300,
                                  "error": 0.001} | options))  # fmt: skip

    return make


@pytest.fixture
def inputs(peers: Any, tmp_path: Path) -> Any:
    """Inputs of a model that nobody runs."""
    import bench

    model, tokens = bench._random("gpt2", vocab_size=300, n_embd=64, n_layer=1, n_head=4)
    return peers.Inputs(model, tokens, tmp_path)


def test_ratios_are_of_the_same_pair(peers: Any, measured: Any) -> None:
    ours = [measured(2.0, prepared=1.0), measured(4.0, prepared=2.0)]
    theirs = [measured(20.0), measured(20.0)]
    assert peers.ratios(theirs, ours, prepared=False) == [10.0, 5.0]
    assert peers.ratios(theirs, ours, prepared=True) == [20.0, 10.0]
    # A system that failed in the second pair is compared in the first alone.
    assert peers.ratios(theirs[:1], ours, prepared=False) == [10.0]
    with pytest.raises(ValueError, match="at hand"):
        peers.ratios(theirs, [measured(2.0)], prepared=True)


def test_a_spread_is_median_and_range(peers: Any) -> None:
    assert peers.spread([12.34]) == "12.3"
    assert peers.spread([30.0, 10.0, 1000.0]) == "30.0 (10.0–1,000.0)"


def test_rows_say_what_was_measured_and_what_is_not_known(
    peers: Any, measured: Any, tmp_path: Path
) -> None:
    ours = peers.Column(peers.OURS, [
        measured(0.5, prepared=0.25, dealt=46_000_000),
        measured(1.0, prepared=0.5, dealt=46_000_000),
    ])  # fmt: skip
    first = peers.Column("semi2k", [measured(5.0, online=2_000_000_000, sends=1_200, error=0.25),
                                    measured(20.0, online=2_000_000_000, sends=1_200)])  # fmt: skip
    third = peers.Column("aby3", [measured(5.0, online=100_000_000)], "not done after 9 s")
    failed = peers.Column("cheetah", failed="1 ended with SIGKILL: a | b")
    lines = peers.table([ours, first, third, failed]).splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]
    assert rows[0][:8] == ["mergec", "1", "1", "4.0", "1.0", "46.0", "1.0", "300 rounds"]
    assert rows[1][:9] == [
        "SPU semi2k", "15.0 (10.0–20.0)", "30.0 (20.0–40.0)", "2,000.0", "500.0", "not counted",
        "≥ 40.0", "1,200", "0.2500",
    ]  # fmt: skip
    assert rows[2][1] == "10.0; then failed: not done after 9 s"
    assert rows[2][5:7] == ["none: no dealer", "2.0"]
    assert rows[3][:2] == ["SPU cheetah", r"failed: 1 ended with SIGKILL: a \| b"]
    trusts = [row[-1] for row in rows]
    assert "colludes with neither" in trusts[0]
    assert "insecure as run" in trusts[1]
    assert trusts[3] == "two parties and nobody else"
    heads = peers.short([ours, first]).splitlines()[0]
    assert "time × mergec" in heads and "prepared" not in heads and "trust" in heads
    facts = dict.fromkeys(("layers", "pairs", "model", "command", "date", "repeats"), "x")
    facts |= {"noise": 0.004, "load": 0.5, "cores": 2, "memory_gb": 8, "python": "3", "torch": "2"}
    text = peers.page([ours, first, third, failed], facts)
    assert "| semi2k | 5.00 | 20.00 |" in text
    assert "| mergec, prepared | 0.25 | 0.50 |" in text
    assert "| aby3 | 5.00 |  |" in text

    peers.write([ours, first, third, failed], facts, tmp_path)
    (tmp_path / "peers.md").unlink()
    peers.main(["--render", "--output", str(tmp_path)])
    assert (tmp_path / "peers.md").read_text() == text


def test_the_link_s_statistics_are_read_per_execution(peers: Any) -> None:
    assert peers.link_details(LOG) == [peers.Sent(900, 7), peers.Sent(500, 5)]


def test_a_failure_is_told_in_spu_s_own_words(peers: Any) -> None:
    log = """[info] started
Traceback (most recent call last):
RuntimeError: what:
\t[libspu/mpc/io.cc:78] unsupported vis type V
stacktrace:
#0 spu::mpc::toShares()+0x7fa1
"""
    assert peers.last_words(log) == "unsupported vis type V"
    assert peers.last_words("ModuleNotFoundError: no jax\n[warning] late\n").endswith("no jax")
    assert peers.last_words("") == "it said nothing"


def test_without_spu_it_says_what_to_run(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"not installed .* run: make \.venv-spu/installed"):
        peers.main(["--spu", str(tmp_path / "python")])
    other = tmp_path / "old"
    other.write_text("#!/bin/sh\necho 0.9.3\n")
    other.chmod(0o755)
    with pytest.raises(SystemExit, match=r"has SPU 0\.9\.3, not 0\.9\.5"):
        peers.installed(other)


def test_parties_are_started_and_what_they_wrote_is_collected(
    peers: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = inputs.folder / "party.py"
    script.write_text(PARTY)
    monkeypatch.setattr(peers, "PARTY", script)
    three = next(peer for peer in peers.PEERS if peer.parties == 3)
    found, logits = peers.run_peer(Path(sys.executable), three, inputs, 2, 60.0)
    assert (found.seconds, found.online, found.sends) == (3.0, 303, 5)
    weights = np.load(inputs.folder / "weights.npz")
    assert np.array_equal(logits, weights["wte"][0])
    assert weights["0/attn.c_attn.weight"].shape == (64, 192)
    assert np.load(inputs.folder / "caches.npz")["0/key"].shape == (4, 128, 16)


@pytest.mark.parametrize(
    ("body", "limit", "reason"),
    [
        ("import sys; sys.exit('no memory left')", 60.0, "prepare ended with code 1: no memory"),
        ("import os; os.kill(os.getpid(), 9)", 60.0, "prepare ended with SIGKILL: it said nothing"),
        ("import time; time.sleep(60)", 0.2, r"not done after 0\.2 s"),
    ],
)
def test_a_peer_that_fails_or_takes_too_long_says_so(
    peers: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch, body: str, limit: float, reason: str
) -> None:
    script = inputs.folder / "party.py"
    script.write_text(body)
    monkeypatch.setattr(peers, "PARTY", script)
    with pytest.raises(peers.PeerError, match=reason):
        peers.run_peer(Path(sys.executable), peers.PEERS[0], inputs, 1, limit)
