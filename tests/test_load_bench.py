"""A short form of the load test; `make load` runs the long one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.roles import ROOT, environment


@pytest.mark.slow
def test_clients_are_served_side_by_side_and_refused_ones_come_back() -> None:
    command = [sys.executable, "benchmarks/load.py", "--clients", "1", "3", "--seconds", "2"]
    given = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if " | " in line]
    rows = {row[0]: row[-1] for row in cells}
    assert int(rows["clients served with all their answers"]) == int(rows["clients"]) == 8
    assert int(rows["refusals"]) > 0, "eight come at once where four may stay"
