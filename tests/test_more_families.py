"""Families that no pass was written for: private logits are the model's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from mergec import compile_decoder
from mergec.compiler.errors import CompileError

_FILE = Path(__file__).parents[1] / "examples" / "every_family.py"

LOGIT_ERROR = 5e-3
"""Of logits up to 3, after two layers."""

QUICK = ("diffllama", "minicpm3", "mpt", "nemotron")
"""One of each kind of attention and norm that the tested families do not have."""


def _example() -> Any:
    spec = importlib.util.spec_from_file_location("every_family", _FILE)
    assert spec is not None
    assert spec.loader is not None
    # A dataclass looks for its module there.
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = _example()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in (*example.FAMILIES, *example.MORE)
    ],
)
def test_logits_are_the_models(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such family")
    measured = example.measure(family)
    assert measured.error < LOGIT_ERROR < 0.1 * measured.logit


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_next", "layers of the type linear_attention"),
        ("jamba", "layers of the type linear_attention"),
        ("mamba", "layers of the type linear_attention"),
        ("rwkv", "keeps no keys and values"),
        ("bert", "keeps no keys and values"),
    ],
)
def test_others_are_refused_with_a_reason(family: str, reason: str) -> None:
    with pytest.raises(CompileError, match=reason) as caught:
        compile_decoder(example.decoder(family))
    assert "\n" not in str(caught.value)
