"""The stages of a compile, in the order in which they run: calibration, passes, checks, assembly.

`driver.compile_decoder` runs them once. `report.history` runs them again with passes left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from mergec.compiler.backend.choose import choose_variants
from mergec.compiler.backend.legalize import legalize
from mergec.compiler.backend.lower import lower
from mergec.compiler.backend.outliers import shrink_outliers
from mergec.compiler.backend.share_constants import share_constants
from mergec.compiler.config import (
    DEFAULT_LENGTH,
    PRESETS,
    CompileConfig,
    Pair,
    Sample,
    as_pair,
)
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.adaptation import read_adaptation
from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.ir import is_shared
from mergec.compiler.graph.manager import PassReport, ordered, run_passes
from mergec.compiler.graph.ranges import annotate_ranges
from mergec.compiler.graph.rewriting import GraphInfo, Pass
from mergec.compiler.graph.verify import verify_dialect
from mergec.compiler.graph.visibility import annotate_visibility
from mergec.passes import available
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import InputSpec, RoleProgram

Sequences = Sequence[Sample]
"""Token sequences, and pairs of them, on which the compiler measures how large each wire gets."""

_SENTENCES = (
    "The capital of France is Paris, and it lies on the river Seine.",
    "def main():\n    for i in range(10):\n        print(i * i)\n",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
)
_CALIBRATION_TOKENS = 32


@dataclass(frozen=True)
class DialectProgram:
    """A graph of dialect ops, data movement and public arithmetic, ready to be legalized.

    graph_module: called as gm(input_ids, *caches).
    inputs: in the order of its placeholders.
    constants: tensor and visibility of every get_attr target.
    pass_report: one report per pass, in the order in which they ran.
    vocab_size: number of tokens; 0 if unknown.
    max_length: most tokens of prompt and answer together.
    """

    graph_module: fx.GraphModule
    inputs: list[InputSpec]
    constants: dict[str, tuple[torch.Tensor, Vis]]
    pass_report: list[PassReport]
    vocab_size: int
    max_length: int

    @property
    def lossy(self) -> bool:
        """Whether a lossy pass changed the graph."""
        return any(report.sites and not report.exact for report in self.pass_report)


def calibration(config: CompileConfig, captured: Captured, tokenizer: Any = None) -> Sequences:
    """The token sequences on which every later stage measures.

    Those of `config.calibration` if given. Otherwise up to 32 token numbers spread evenly over the
    vocabulary, and a few fixed sentences, without tokens that the model does not know; the same
    numbers in reverse instead of the sentences, if there is no tokenizer or it knows none of them.

    Raises CompileError if the model cannot run on a given sequence.
    """
    if config.calibration:
        _check_calibration(config, captured)
        return config.calibration
    vocab_size = captured.vocab_size
    size = min(_CALIBRATION_TOKENS, captured.max_length or _CALIBRATION_TOKENS)
    step = max(1, vocab_size // size)
    spread = [(i * step + i) % vocab_size for i in range(size)]
    read = [_read(tokenizer, text)[:size] for text in _SENTENCES] if tokenizer is not None else []
    known = [[token for token in ids if 0 <= token < vocab_size] for ids in read]
    found = [spread, *(filter(None, known) if any(known) else [spread[::-1]])]
    # An encoder-decoder reads each as the source and as its answer, which begins like this.
    begun = [captured.start] if captured.encodes else []
    return [[*begun, *sequence][:size] for sequence in found]


def _read(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text; none if the tokenizer cannot encode it, as one for other symbols."""
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception:  # noqa: BLE001  (what tokenizers raise has no common class)
        return []


def _check_calibration(config: CompileConfig, captured: Captured) -> None:
    limit = captured.max_length
    for position, sample in enumerate(config.calibration):
        known = captured.vocab_size or math.inf
        if isinstance(sample, Pair) and not captured.encodes:
            raise CompileError(
                f"calibration prompt {position} is a source and its answer, but the model is a "
                "decoder; give both as one sequence"
            )
        pair = as_pair(sample)
        tokens = (*pair.source, *pair.answer) if isinstance(sample, Pair) else pair.answer
        wrong = [token for token in tokens if not 0 <= token < known]
        if wrong:
            raise CompileError(
                f"calibration prompt {position} holds the token {wrong[0]}, which is not in the "
                f"vocabulary of {captured.vocab_size}"
            )
        if limit and len(tokens) > limit:
            raise CompileError(
                f"calibration prompt {position} has {len(tokens)} tokens, but the model was "
                f"captured for at most {limit}; shorten it"
            )


def longest(config: CompileConfig, captured: Captured) -> int:
    """Most tokens of prompt and answer together: what `config` asks for, or else what is possible.

    Raises CompileError if the model cannot take as many, or is not what was captured for as many.
    """
    asked, limit, branch = config.max_length, captured.limit, captured.branch
    if asked is not None and limit is not None and asked > limit.length:
        raise CompileError(
            f"max_length is {asked}, but the model takes at most {limit.length} tokens: "
            f"{limit.reason}; ask for {limit.length} or fewer"
        )
    length = asked or DEFAULT_LENGTH
    if limit is not None:
        length = min(length, limit.length)
    if branch is not None and length > branch.length:
        raise CompileError(
            f"the model is not one function of its tokens: {branch.reason}; compile with "
            f"max_length={branch.length} or less, or rewrite it without that branch"
        )
    return length


def resolved(config: CompileConfig) -> CompileConfig:
    """The options with the preset, the passes, the prompts and the drafts of the adapted folder.

    Raises CompileError if other options than those ask for another preset, or leave out a pass.
    """
    if not config.adapted:
        return config
    adaptation = read_adaptation(config.adapted)
    if config.preset not in ("exact", adaptation.preset):
        raise CompileError(
            f"{config.adapted} was adapted for the preset {adaptation.preset!r}, not for "
            f"{config.preset!r}; leave out the preset, or adapt the model for the other one"
        )
    dropped = [name for name in adaptation.passes if name in config.disable]
    if dropped:
        raise CompileError(
            f"{config.adapted} was trained for the pass {dropped[0]!r}; do not disable it"
        )
    return replace(
        config,
        preset=adaptation.preset,
        enable=tuple(dict.fromkeys((*adaptation.enable, *config.enable))),
        calibration=config.calibration or adaptation.calibration,
        # Heads are for drafts that a step checks.
        speculate_up_to=max(config.speculate_up_to, adaptation.medusa),
    )


def select(config: CompileConfig) -> list[type[Pass]]:
    """The passes that `config` asks for, in the order in which they run.

    Raises CompileError if `enable` or `disable` names an unknown pass, if both name one, or if the
    passes' `after` cannot be satisfied.
    """
    known = available()
    both = sorted({*config.enable} & {*config.disable})
    if both:
        raise CompileError(f"the pass {both[0]!r} is both enabled and disabled; leave out one")
    check_names((*config.enable, *config.disable))
    asked = {*PRESETS[config.preset], *config.enable}
    chosen = [
        kind
        for name, kind in known.items()
        if (kind.exact or name in asked) and name not in config.disable
    ]
    for kind in config.extra_passes:
        if not issubclass(kind, Pass):
            raise CompileError(
                f"extra_passes holds {kind.__qualname__}, which is not a subclass of mergec.Pass"
            )
    return ordered([*chosen, *config.extra_passes], known.values())


def check_names(names: Sequence[str]) -> None:
    """Raise CompileError, with the known names, if there is no pass of one of these names."""
    known = available()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CompileError(f"unknown pass {unknown[0]!r}; there are: {', '.join(sorted(known))}")


def runs_anyway(config: CompileConfig) -> list[str]:
    """The passes that `enable` names needlessly: exact ones, and those of the preset."""
    known = available()
    return [name for name in config.enable if known[name].exact or name in PRESETS[config.preset]]


def left_out(config: CompileConfig) -> dict[str, str]:
    """Why each pass that `config` does not ask for was left out, by name."""
    chosen = {kind.name() for kind in select(config)}
    return {
        name: "the option `disable` names it"
        if name in config.disable
        else f"it is lossy, and the preset {config.preset!r} does not ask for it"
        for name in sorted(available())
        if name not in chosen
    }


def rewrite(
    captured: Captured,
    config: CompileConfig,
    passes: Sequence[type[Pass]] | None = None,
    sequences: Sequences | None = None,
) -> list[PassReport]:
    """Run passes on a captured graph, in place; return one report per pass.

    passes: by default those of `select`. sequences: by default those of `calibration`.
    """
    load_all()
    if sequences is None:
        sequences = calibration(config, captured)
    info = GraphInfo(
        captured.inputs,
        captured.constants,
        sequences,
        config.reveal,
        float(config.logit_noise),
        NETWORKS[config.network],
        read_adaptation(config.adapted).constants if config.adapted else {},
    )
    chosen = select(config) if passes is None else passes
    tokens = as_pair(sequences[0]).source
    reports = run_passes(captured.graph_module, info, chosen, tokens, config.check_passes)
    left = sorted(info.trained.keys() - info.taken)
    if passes is None and left:
        raise CompileError(
            f"{config.adapted} holds {left[0]}, for which this model has no place; give the model "
            "that was adapted"
        )
    return reports


def to_dialect(
    captured: Captured,
    config: CompileConfig,
    passes: Sequence[type[Pass]] | None = None,
    sequences: Sequences | None = None,
) -> DialectProgram:
    """Rewrite a captured graph in place, check that every op has a protocol, measure ranges.

    passes, sequences: as for `rewrite`. Raises CompileError that names every op without a protocol;
    and if the result would be revealed to nobody.
    """
    if sequences is None:
        sequences = calibration(config, captured)
    reports = rewrite(captured, config, passes, sequences)
    graph_module = captured.graph_module
    annotate_visibility(graph_module, captured.inputs, captured.constants)
    if config.weights == "shared":
        share_constants(captured)
    verify_dialect(graph_module)
    _check_result(graph_module)
    max_length = longest(config, captured)
    # The constants of lossy passes hold for the calibration prompts: beyond them the program may
    # diverge, in the clear as well, so that no range covers it.
    tables = not any(report.sites and not report.exact for report in reports)
    annotate_ranges(graph_module, captured.inputs, sequences, max_length, tables=tables)
    shrink_outliers(captured, config.fractional_bits)
    return DialectProgram(
        graph_module,
        captured.inputs,
        captured.tensors(),
        reports,
        captured.vocab_size,
        max_length,
    )


def _check_result(graph_module: fx.GraphModule) -> None:
    (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
    results: Any = output.args[0]
    if all(map(is_shared, results)):
        reason = "it is revealed to nobody; let the pass reveal_logits run"
        raise CompileError("the client would not learn the result", {results[0]: reason})


def assemble(dialect: DialectProgram, config: CompileConfig) -> dict[str, RoleProgram]:
    """The program of each role, by name: place truncations and openings, lower, choose protocols.

    The graph is legalized in place. The programs' manifests are empty.
    """
    bits, exact = config.fractional_bits, config.rounding == "exact"
    legalize(dialect.graph_module, bits, exact)
    roles = lower(dialect.graph_module, dialect.inputs, dialect.constants, bits)
    choose_variants(roles, NETWORKS[config.network], bits, exact, dialect.max_length)
    return roles
