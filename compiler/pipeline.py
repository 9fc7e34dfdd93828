"""The stages of a compile, in the order in which they run: passes, checks, ranges, assembly.

`driver.compile_decoder` runs them once. `report.history` runs them again with passes left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mergec.compiler.backend.choose import choose_variants
from mergec.compiler.backend.legalize import legalize
from mergec.compiler.backend.lower import lower
from mergec.compiler.backend.outliers import shrink_outliers
from mergec.compiler.backend.padding import check_padding
from mergec.compiler.backend.share_constants import share_constants
from mergec.compiler.config import CompileConfig, as_pair
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.adaptation import read_adaptation
from mergec.compiler.frontend.calibration import Sequences, calibration, longest
from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.ir import is_shared
from mergec.compiler.graph.manager import PassReport, run_passes
from mergec.compiler.graph.ranges import annotate_ranges
from mergec.compiler.graph.rewriting import GraphInfo, Pass
from mergec.compiler.graph.verify import verify_dialect
from mergec.compiler.graph.visibility import annotate_visibility
from mergec.compiler.selection import select
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import PADS, InputSpec, RoleProgram


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
    pad: int = 0,
) -> DialectProgram:
    """Rewrite a captured graph in place, check that every op has a protocol, measure ranges.

    passes, sequences: as for `rewrite`. pad: the token that prompts are padded with, if they are
    (`CompileConfig.pad_prompt`). Raises CompileError that names every op without a protocol;
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
    padded = any(spec.name == PADS for spec in captured.inputs)
    if padded:
        check_padding(graph_module, captured.inputs, sequences, pad, max_length)
    elif config.pad_prompt and passes is None:
        raise CompileError(
            "no attention of this model takes padding, so pad_prompt has no effect; leave it out"
        )
    annotate_ranges(
        graph_module,
        captured.inputs,
        sequences,
        max_length,
        tables=tables,
        pad=pad if padded else -1,
    )
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
    unfused = {
        skip.module: skip.reason
        for report in dialect.pass_report
        if report.name == "fuse_attention"
        for skip in report.skips
    }
    legalize(dialect.graph_module, bits, exact, unfused)
    roles = lower(dialect.graph_module, dialect.inputs, dialect.constants, bits)
    choose_variants(roles, NETWORKS[config.network], bits, exact, dialect.max_length)
    return roles
