"""Random and adversarial inputs on the whole range: some by default, a million in the slow test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.protocols.evidence import CHECKS, Check, main

FEW, MANY, TRUNCATIONS = 3_000, 1_000_000, 100_000_000


def _hold(check: Check, count: int) -> None:
    outcome = check.attempt(count)
    assert outcome.tried > 0
    assert outcome.failures == 0, f"{outcome.failures} of {outcome.tried}, worst {outcome.worst}"


@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_a_few(check: Check) -> None:
    _hold(check, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_a_million(check: Check) -> None:
    _hold(check, (TRUNCATIONS if check.name == "truncation by 16" else MANY) // check.cost)


def test_a_single_row_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "evidence.md"
    page.write_text("| ELU | old |\n| mish | old |\n", encoding="utf-8")
    options = ["--only", "mish", "--count", "300", "--output", str(page)]
    monkeypatch.setattr("sys.argv", ["evidence", *options])
    main()
    rows = page.read_text(encoding="utf-8").splitlines()
    assert "| ELU | old |" in rows
    (row,) = [row for row in rows if row.startswith("| mish |")]
    assert "| 300 | 0 |" in row
