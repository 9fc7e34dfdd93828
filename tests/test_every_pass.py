"""Each exact pass preserves every family's outputs, alone and with the others; it is idempotent."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.frontend.load import load_model, packaged_model
from mergec.compiler.graph.contract import TOLERANCE
from mergec.compiler.graph.rewriting import STAGES, Pass
from mergec.compiler.pipeline import rewrite
from mergec.compiler.selection import select
from mergec.compiler.text import dump
from tests.families import captured, every_family, random_decoder

CHECKED = CompileConfig(check_passes=True)
"""Runs the graph in float64 before and after each pass, see mergec.compiler.graph.contract."""

DIALECT = STAGES.index("dialect")
PASSES = select(CompileConfig())
OPTIMIZING = [kind for kind in PASSES if STAGES.index(kind.stage) > DIALECT]


@functools.cache
def in_dialect(family: str) -> Captured:
    """A family's step, fully converted to the dialect; every pass is checked on the way."""
    step = captured(family)
    rewrite(step, CHECKED, [kind for kind in PASSES if kind not in OPTIMIZING])
    return step


def settles(step: Captured, passes: list[type[Pass]]) -> int:
    """The passes preserve the graph's outputs, and a second run changes nothing; returns the sites.

    The contract also ensures that a pass that finds nothing does not touch the graph.
    """
    first = rewrite(step, CHECKED, passes)
    text = dump(step.graph_module)
    again = rewrite(step, CompileConfig(), passes)
    assert [(report.name, report.sites) for report in again if report.sites] == []
    assert dump(step.graph_module) == text
    return sum(report.sites for report in first)


def test_the_tolerance_is_as_promised() -> None:
    assert TOLERANCE == 1e-9


FEW = ("gpt2", "llama", "gemma2", "bloom", "phi")
"""Families with different attention, norms and activations; the others are slow tests."""


@every_family(FEW)
def test_alone(family: str) -> None:
    for kind in OPTIMIZING:
        settles(in_dialect(family).copy(), [kind])


@every_family()
def test_all_together(family: str) -> None:
    assert settles(in_dialect(family).copy(), OPTIMIZING) > 0


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_from_the_start(family: str) -> None:
    assert settles(captured(family), PASSES) > 0


@functools.cache
def large(name: str) -> Captured:
    """SmolLM2 itself, or GPT-2 base with random weights."""
    if name == "smollm2":
        try:
            packaged_model(name)
        except CompileError:
            pytest.skip("its package is not installed")
        model: Any = load_model(name)[0]
    else:
        base = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 128}
        model = random_decoder("gpt2", **base, vocab_size=50257).float()
    return capture(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-base", "smollm2"])
def test_real_sizes(name: str) -> None:
    step = large(name).copy()
    assert settles(step, PASSES) > 0
    step = large(name).copy()
    rewrite(step, CompileConfig(), [kind for kind in PASSES if kind not in OPTIMIZING])
    for kind in OPTIMIZING:
        settles(step.copy(), [kind])
