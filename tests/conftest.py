"""Golden files: texts under tests/ that results are compared with, rewritten by --update-golden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.passes.harness")

GOLDEN = Path(__file__).parent / "golden"

Golden = Callable[[str | Path, str], None]
"""Compares a text with the file of this name under tests/golden, or with one elsewhere."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="Rewrite the golden files that differ."
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Fails if a text differs from its golden file; with --update-golden, rewrites the file."""

    def compare(name: str | Path, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing; run pytest with --update-golden to write it"
        assert text == path.read_text(), f"{path} differs; --update-golden rewrites it"

    return compare
