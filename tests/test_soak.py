"""A short form of the soak; `make soak` runs the long one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.roles import ROOT, environment


@pytest.mark.slow
def test_answers_while_everything_is_killed() -> None:
    command = [sys.executable, "benchmarks/soak.py", "--answers", "12", "--seed", "3"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures["answers"] >= 12
    assert figures["outcomes"]["done"] > 0
