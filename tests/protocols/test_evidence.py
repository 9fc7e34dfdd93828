"""Random and adversarial inputs on the whole range: some by default, a million in the slow test."""

from __future__ import annotations

import pytest

from tests.protocols.evidence import CHECKS, Check

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
