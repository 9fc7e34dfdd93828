"""Golden files, which --update-golden rewrites, and how files are divided among processes."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.passes.harness")

# What modules and collected tests are made of stays until the end. To look for garbage among it
# takes a quarter of the time in which it is loaded; `pytest_collection_finish` enables it again.
gc.disable()
atexit.register(gc.unfreeze)  # extensions in C report what nobody collects

TOGETHER = {
    "families": {
        "test_capture.py",
        "test_every_pass.py",
        "test_legalize.py",
        "test_parse.py",
        "test_pipeline.py",
        "test_presets.py",
        "test_resend_hidden.py",
        "test_shared_weights.py",
    },
    "encoder-decoders": {
        "test_encoder_decoder_presets.py",
        "test_encoder_decoders.py",
        "test_fix_attention.py",
        "test_merge_projections.py",
        "test_merge_tables.py",
    },
}
"""Files whose tests use the same models."""

GOLDEN = Path(__file__).parent / "golden"

Golden = Callable[[str | Path, str], None]
"""Compares a text with the file of this name under tests/golden, or with one elsewhere."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="Rewrite the golden files that differ."
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, give files of the same models to one process, as if they were one.

    A process captures each model once, which takes seconds.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            shared = (group for group, files in TOGETHER.items() if Path(file).name in files)
            return next(shared, file)

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """From here on, garbage is collected, but not looked for among what has been loaded."""
    gc.freeze()
    gc.enable()


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
