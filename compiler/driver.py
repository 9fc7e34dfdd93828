"""The whole compile, from top to bottom: capture, rewrite, assemble, measure, describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mergec.compiler.backend.deviation import measure_deviation
from mergec.compiler.backend.emit import file_digests, shapes, tokenizer_files, value_types
from mergec.compiler.backend.rounding import check_rounding
from mergec.compiler.config import DEFAULT_LENGTH, CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.adaptation import read_adaptation, read_heads, stands_at
from mergec.compiler.frontend.calibration import calibration, longest
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.frontend.exclusive import exclusive
from mergec.compiler.frontend.generation import generation_settings
from mergec.compiler.frontend.heads import add_heads
from mergec.compiler.frontend.load import load_model
from mergec.compiler.frontend.positions import keep_drafts
from mergec.compiler.graph.manager import PassReport
from mergec.compiler.manifest import cost_summary, described, model_name, pad_token, stop_tokens
from mergec.compiler.pipeline import assemble, to_dialect
from mergec.compiler.program import Program
from mergec.compiler.report.history import History
from mergec.compiler.selection import left_out, resolved, runs_anyway, select
from mergec.compiler.text import assign_names, length_symbols
from mergec.runtime.core.arguments import Arguments
from mergec.runtime.core.errors import BundleError
from mergec.runtime.engine.rehearsal import Rehearsal
from mergec.runtime.program.bundle import complete
from mergec.runtime.program.manifest import Manifest, tokenizer_digest
from mergec.runtime.program.program import RoleProgram

Progress = Callable[[str], object]


def _quiet(_: str) -> None:
    """No progress."""


@exclusive
def compile_decoder(
    model: torch.nn.Module,
    tokenizer: Any = None,
    config: CompileConfig | None = None,
    progress: Progress = _quiet,
    captured: Captured | None = None,
) -> Program:
    """Compile a decoder or an encoder-decoder into the programs of client, server and dealer.

    Args:
        model: a Hugging Face causal decoder or encoder-decoder; or any module that maps token ids,
            int64 [1, N], to logits [1, N, V], which is compiled without a KV cache. It is not
            changed.
        tokenizer: the model's Hugging Face tokenizer. It becomes part of the client's bundle.
            Without one, prompts and answers are token numbers.
        config: options; see `CompileConfig`. By default exact, for a fast network, with
            16 fractional bits and at most 1024 tokens of prompt and answer together, or as many as
            the model takes.
        progress: called with one line of text as each stage begins.
        captured: what `capture(model)` returned, to compile one model several times. It is not
            changed.

    Returns:
        The program, in memory: save it, inspect it, or run it here.

    Raises:
        CompileError: the model is not a dense attention model, has weights that are not finite,
            calls an op that has no protocol, or needs numbers that do not fit the ring; its
            generation_config has a setting that cannot be honoured; the tokenizer cannot be stored;
            or an option is wrong. The message says where in the model's source.

    Threads that compile wait for each other.

    Example:
        >>> import mergec
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer  # doctest: +SKIP
        >>> name = "HuggingFaceTB/SmolLM2-135M-Instruct"
        >>> model = AutoModelForCausalLM.from_pretrained(name)  # doctest: +SKIP
        >>> tokenizer = AutoTokenizer.from_pretrained(name)  # doctest: +SKIP
        >>> config = mergec.CompileConfig(max_length=256, network="lan")
        >>> program = mergec.compile_decoder(model, tokenizer, config)  # doctest: +SKIP
        >>> program.save("bundles/smollm2")  # doctest: +SKIP
    """
    config = _check_arguments(model, tokenizer, config, progress, captured)
    config = resolved(config)
    select(config)  # Names of passes that do not exist are reported before any work.
    files = tokenizer_files(tokenizer)
    progress("capturing the model and rewriting it")
    captured = capture(model) if captured is None else captured
    if config.speculate_up_to:
        captured = captured.copy()
        keep_drafts(captured, config.speculate_up_to)
    heads = read_heads(config.adapted) if config.adapted else None
    if heads is not None:
        add_heads(captured, heads)
    settings = generation_settings(
        model,
        reveal=config.reveal,
        ignored=config.ignore_settings,
        vocab_size=captured.vocab_size,
    )
    length = longest(config, captured)
    if config.max_length is None and captured.limit is not None and length < DEFAULT_LENGTH:
        progress(f"max_length is {length}, the most that the model takes: {captured.limit.reason}")
    sequences = calibration(config, captured, tokenizer)
    stop = stop_tokens(model, tokenizer)
    pad = pad_token(stop, captured.vocab_size)
    dialect = to_dialect(captured.copy(), config, sequences=sequences, pad=pad)
    for line in _without_effect(dialect.pass_report):
        progress(line)
    progress("placing truncations and openings, lowering to instructions")
    roles = assemble(dialect, config)
    check_rounding(dialect.graph_module, dialect.inputs, sequences, lossy=dialect.lossy)
    graph = dialect.graph_module.graph
    types = value_types(dialect.graph_module, assign_names(graph), length_symbols(graph))
    deviation = {}
    if config.adapted:
        deviation = dict(read_adaptation(config.adapted).deviation)
    elif dialect.lossy:
        progress("comparing the lossy program with the model")
        deviation = measure_deviation(roles["server"], captured, sequences)
    progress("counting rounds and bytes")
    manifest = Manifest(
        model=config.name or model_name(model),
        fractional_bits=config.fractional_bits,
        max_length=dialect.max_length,
        vocab_size=dialect.vocab_size,
        stop_tokens=stop,
        generation=settings,
        answer_start=captured.start,
        pad_token=pad if roles["client"].pads else -1,
        tokenizer=tokenizer_digest(file_digests(files)),
        lossy=dialect.lossy,
        deviation=deviation,
        weights=config.weights,
        reveal=config.reveal,
        logit_noise=float(config.logit_noise) if config.reveal == "logits" else 0.0,
        network=config.network,
        rounding=config.rounding,
        speculate_up_to=config.speculate_up_to,
        medusa=heads.count if heads is not None else 0,
        shapes=shapes(roles["client"], types),
        cost=cost_summary(roles["client"], dialect.max_length, config),
        passes=list(map(described, dialect.pass_report)),
        left_out=left_out(config),
    )
    for program in roles.values():
        program.manifest = manifest
        program.manifest = complete(program)
    _rehearse(roles["client"])
    return Program(roles, types, files, history=History(captured, config, sequences))


def _rehearse(program: RoleProgram) -> None:
    """Raise CompileError unless the parties can run the program's steps, as far as shapes tell."""
    rehearsal = Rehearsal(program)
    for step in program.manifest.cost.values():
        try:
            rehearsal.step(step["new"], step["past"])
        except BundleError as error:
            raise CompileError(f"the parties could not run the program: {error}") from error


def _check_arguments(
    model: Any, tokenizer: Any, config: Any, progress: Any, captured: Any
) -> CompileConfig:
    """The options; raises CompileError for an argument of another type than documented."""
    check = Arguments(CompileError)
    if not isinstance(model, torch.nn.Module):
        raise CompileError(
            f"a {type(model).__name__} is not a model; load it first, as an nn.Module"
        )
    if isinstance(tokenizer, CompileConfig):
        raise CompileError("the second argument is the tokenizer; pass options as config=")
    if tokenizer is not None and not (
        callable(tokenizer) and callable(getattr(tokenizer, "save_pretrained", None))
    ):
        raise CompileError(
            f"a {type(tokenizer).__name__} is not a tokenizer; load it first, with transformers' "
            "AutoTokenizer, or leave it out for prompts of token numbers"
        )
    if config is not None:
        check.instance("config", config, CompileConfig, "make one, as CompileConfig(max_length=64)")
    check.function("progress", progress)
    if captured is not None:
        check.instance("captured", captured, Captured, "pass what capture(model) returned")
    return config or CompileConfig()


def compile_source(
    source: str | Path,
    options: Mapping[str, Any],
    progress: Progress = _quiet,
    *,
    keep_history: bool = False,
) -> Program:
    """Compile a model that is loaded by name.

    Args:
        source: a folder in Hugging Face format, a .gguf file, or `smollm2`.
        options: those of `CompileConfig`. The program is named after `source` unless they name it.
        progress: called with one line of text as each stage begins.
        keep_history: keep the model's own weights in memory beside the program's, so that the
            program can show how it was compiled.

    Raises:
        CompileError: the model cannot be loaded or compiled; see `compile_decoder`.
    """
    config = CompileConfig(**options)
    if not config.adapted and stands_at(Path(source)):
        preset = read_adaptation(source).preset
        if options.get("preset") == "exact" != preset:
            raise CompileError(
                f"{source} was adapted for the preset {preset!r}, and its weights fit no other; "
                "compile the model from before it was adapted"
            )
        config = replace(config, adapted=str(source))
    config = resolved(config)
    if not config.name:
        config = replace(config, name=Path(source).stem)
    select(config)
    for name in runs_anyway(config):
        progress(f"the pass {name} runs without being enabled")
    progress("loading the model")
    model, tokenizer = load_model(source)
    program = compile_decoder(model, tokenizer, config, progress)
    if not keep_history:
        program.history = None
    return program


def _without_effect(reports: Sequence[PassReport]) -> Iterator[str]:
    """A line for each lossy pass that changed nothing."""
    for report in reports:
        if report.exact or report.sites:
            continue
        why = "the model has nothing that looks like its pattern"
        if report.skips:
            first = report.skips[0]
            why = f"{first.module or first.node}: {first.reason}"
        yield f"{report.name} changes nothing: {why}"
