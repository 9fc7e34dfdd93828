"""What a manifest says about a compile: names, the tokens that end an answer, passes, and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.config import CompileConfig
from mergec.compiler.graph.manager import PassReport
from mergec.runtime.program.program import FINISH, RoleProgram

COST_LENGTHS = {"prompt": (32, 0), "decode": (1, 128)}
"""New and past tokens of the steps whose cost the manifest holds."""


def described(report: PassReport) -> dict[str, Any]:
    return {
        "pass": report.name,
        "summary": report.summary,
        "exact": report.exact,
        "sites": report.sites,
        "nodes_before": report.nodes_before,
        "nodes_after": report.nodes_after,
        "skips": [asdict(skip) for skip in report.skips],
    }


def model_name(model: torch.nn.Module) -> str:
    """The last part of the name or path that the model was loaded from, or its class."""
    path = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    return Path(path).name or type(model).__name__


def stop_tokens(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Every token that ends an answer, by the model's generation settings and the tokenizer."""
    found: list[Any] = []
    for owner in (getattr(model, "generation_config", None), tokenizer):
        token = getattr(owner, "eos_token_id", None)
        found += token if isinstance(token, (list, tuple)) else [token]
    return sorted({int(token) for token in found if token is not None})


def pad_token(stop_tokens: Sequence[int], vocab_size: int) -> int:
    """A token to pad prompts with. Any does, as no other token attends to it."""
    return next((token for token in stop_tokens if 0 <= token < vocab_size), 0)


def cost_summary(program: RoleProgram, limit: int, config: CompileConfig) -> dict[str, Any]:
    """Lengths, rounds and bytes of the steps of COST_LENGTHS, cut to `limit` tokens; by name."""
    summary = {}
    lengths = {}
    for name, (new, past) in COST_LENGTHS.items():
        new = min(new, limit) if limit else new
        lengths[name] = new, min(past, limit - new) if limit else past
    if program.resends:
        lengths[FINISH] = 0, 1
    for name, (new, past) in lengths.items():
        exact = config.rounding == "exact"
        total = cost_report(program, new, past, config.fractional_bits, exact).total
        summary[name] = {"new": new, "past": past, **asdict(total)}
    return summary
