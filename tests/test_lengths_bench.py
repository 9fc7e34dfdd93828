"""The observer of `make lengths`: who tells answers apart by the lengths of their steps."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.roles import ROOT


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("lengths")


def test_the_distance_of_lengths(lengths: Any) -> None:
    one = ((8, 1), (8, 3), (8, 1))
    for other, changed in (
        (one, 0), ((), 3), (one[:2], 1), (((8, 1), (8, 2), (8, 1)), 1), ((*one, (2, 8)), 1),
        (one[1:], 1), (((8, 3), (8, 1), (8, 1)), 2),
    ):  # fmt: skip
        assert lengths.edits(one, other) == lengths.edits(other, one) == changed
    assert lengths.growth(one, one) == 0
    # 1, 4, 5 and 1, 2, 4 and 4: the shorter one stays where it ends.
    assert lengths.growth(one, ((8, 1), (8, 1), (8, 2), (8, 0))) == 0 + 2 + 1 + 1


def test_an_observer_finds_what_differs_and_guesses_the_rest(lengths: Any) -> None:
    flat, steep = ((8, 1),) * 5, ((8, 4),) * 2
    for far in (lengths.edits, lengths.growth):
        assert lengths.named([[flat], [steep]], [[flat], [steep]], far) == 1
        assert lengths.named([[flat], [steep]], [[steep], [flat]], far) == 0
        assert lengths.named([[flat]] * 4, [[flat]] * 4, far) == 0.25
        assert lengths.named([[flat, steep], [flat]], [[steep], [flat]], far) == 0.75


def test_the_sections_have_a_place_on_the_page(lengths: Any) -> None:
    page = Path(lengths.TARGET).read_text(encoding="utf-8")
    from report import between  # type: ignore[import-not-found]
    from speculation import LENGTHS  # type: ignore[import-not-found]

    assert len(LENGTHS) == 3
    assert all(between(lengths.TARGET, mark) in page for mark in LENGTHS)
    assert all(between(lengths.TARGET, mark).startswith("<!-- ") for mark in LENGTHS)
