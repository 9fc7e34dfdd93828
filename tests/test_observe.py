"""A role's log: lines that survive many processes writing to one output."""

from __future__ import annotations

import json
import sys

from mergec.runtime.roles.observe import open_log


class _Output:
    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> None:
        self.writes.append(text)

    def flush(self) -> None:
        pass


def test_a_line_is_a_single_write(monkeypatch) -> None:
    output = _Output()
    monkeypatch.setattr(sys, "stderr", output)
    log = open_log("server")
    log.info("session began", purpose="session")
    log.info("session ended")
    assert [json.loads(line)["event"] for line in output.writes] == [
        "session began",
        "session ended",
    ]
    assert all(line.endswith("\n") for line in output.writes)
