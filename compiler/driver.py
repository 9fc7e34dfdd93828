"""The whole compile on one page: capture, passes, verify, legalize, lower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.backend.deviation import measure_deviation
from mergec.compiler.backend.emit import shapes, tokenizer_files, value_types
from mergec.compiler.config import CompileConfig
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.frontend.load import load_model
from mergec.compiler.graph.manager import PassReport
from mergec.compiler.pipeline import DialectProgram, assemble, calibration, finish, rewrite
from mergec.compiler.program import Program
from mergec.compiler.report.history import History
from mergec.compiler.text import assign_names, length_symbols
from mergec.runtime.program.program import FINISH, RoleProgram

Progress = Callable[[str], object]

COST_LENGTHS = {"prompt": (32, 0), "decode": (1, 128)}
"""New and past tokens of the steps whose cost the manifest tells."""


def _quiet(_: str) -> None:
    """No progress."""


def compile_decoder(
    model: torch.nn.Module,
    tokenizer: Any = None,
    config: CompileConfig | None = None,
    progress: Progress = _quiet,
    captured: Captured | None = None,
) -> Program:
    """Compile a Hugging Face decoder, or any module of its kind, for client, server and dealer.

    The tokenizer goes into the client's bundle; without one, prompts are token numbers. captured:
    what `capture` gave for this model, if it is compiled several times.
    """
    config = config or CompileConfig()
    progress("capturing the model and rewriting it")
    original = capture(model) if captured is None else captured
    captured = original.copy()
    history = History(original, config, tokenizer)
    reports = rewrite(captured, config, tokenizer=tokenizer)
    dialect = finish(captured, config, reports, tokenizer)
    graph_module = dialect.graph_module
    progress("placing truncations and openings, lowering to instructions")
    roles = assemble(dialect, config)
    types = value_types(
        graph_module, assign_names(graph_module.graph), length_symbols(graph_module.graph)
    )
    for program in roles.values():
        program.manifest |= _describe(model, tokenizer, config, dialect)
        program.manifest["shapes"] = shapes(program, types)
    if roles["server"].manifest["lossy"]:
        progress("comparing the lossy program with the model")
        sequences = calibration(config, tokenizer, captured)
        deviation = measure_deviation(roles["server"], original, sequences)
        for program in roles.values():
            program.manifest["deviation"] = deviation
    progress("counting rounds and bytes")
    cost = _cost_summary(roles["client"], config)
    for program in roles.values():
        program.manifest["cost"] = cost
    return Program(roles, types, tokenizer_files(tokenizer), history=history)


def compile_source(
    source: str | Path,
    options: Mapping[str, Any],
    progress: Progress = _quiet,
    *,
    keep_history: bool = False,
) -> Program:
    """Compile a model folder, a .gguf file, or `smollm2`; `options` are CompileConfig's.

    keep_history: keep the model's own weights in memory beside the program's, so that the program
    can tell how it was compiled.
    """
    config = CompileConfig(**options)
    progress("loading the model")
    model, tokenizer = load_model(source)
    program = compile_decoder(model, tokenizer, config, progress)
    for role in program.roles.values():
        role.manifest["model"] = config.name or Path(source).stem
    if not keep_history:
        program.history = None
    return program


def _describe(
    model: torch.nn.Module, tokenizer: Any, config: CompileConfig, dialect: DialectProgram
) -> dict[str, Any]:
    return {
        "model": config.name or _model_name(model),
        "fractional_bits": config.fractional_bits,
        "weights": config.weights,
        "reveal": config.reveal,
        "network": config.network,
        "max_length": dialect.max_length,
        "vocab_size": dialect.vocab_size,
        "stop_tokens": _stop_tokens(model, tokenizer),
        "lossy": any(report.sites and not report.exact for report in dialect.pass_report),
        "passes": [_describe_pass(report) for report in dialect.pass_report],
        "left_out": dialect.left_out,
    }


def _describe_pass(report: PassReport) -> dict[str, Any]:
    return {
        "pass": report.name,
        "summary": report.summary,
        "exact": report.exact,
        "sites": report.sites,
        "nodes_before": report.nodes_before,
        "nodes_after": report.nodes_after,
        "skips": [asdict(skip) for skip in report.skips],
    }


def _model_name(model: torch.nn.Module) -> str:
    """The last part of the name or path it was loaded from, or its class."""
    path = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    return Path(path).name or type(model).__name__


def _stop_tokens(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Every token that ends an answer, by the model's generation settings and the tokenizer."""
    found: list[Any] = []
    for owner in (getattr(model, "generation_config", None), tokenizer):
        token = getattr(owner, "eos_token_id", None)
        found += token if isinstance(token, (list, tuple)) else [token]
    return sorted({int(token) for token in found if token is not None})


def _cost_summary(program: RoleProgram, config: CompileConfig) -> dict[str, Any]:
    summary = {}
    limit = program.manifest["max_length"]
    for name, (new, past) in COST_LENGTHS.items():
        new = min(new, limit) if limit else new
        past = min(past, limit - new) if limit else past
        total = cost_report(program, new, past, config.fractional_bits).total
        summary[name] = {"new": new, "past": past, **asdict(total)}
    if program.resends:
        total = cost_report(program, 0, 1, config.fractional_bits).total
        summary[FINISH] = {"new": 0, "past": 1, **asdict(total)}
    return summary
