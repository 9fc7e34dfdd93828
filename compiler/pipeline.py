"""From a model to a verified dialect graph with visibilities and value ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from compiler.capture import Captured, capture
from compiler.config import CompileConfig
from compiler.errors import CompileError
from compiler.ranges import annotate_ranges
from compiler.verify import verify_dialect
from compiler.visibility import annotate_visibility
from passes.base import GraphInfo, PassReport, available, ordered, run_passes
from runtime.op import load_all
from runtime.program import InputSpec
from runtime.spec import Vis

_SENTENCES = (
    "The capital of France is Paris, and it lies on the river Seine.",
    "def main():\n    for i in range(10):\n        print(i * i)\n",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
)
_CALIBRATION_TOKENS = 32


@dataclass(frozen=True)
class DialectProgram:
    """A graph of dialect ops, data movement and public arithmetic, ready to be legalized.

    graph_module: called as gm(input_ids, *caches). inputs: in the order of its placeholders.
    constants: tensor and visibility of every get_attr target. max_length: most tokens in all.
    """

    graph_module: fx.GraphModule
    inputs: list[InputSpec]
    constants: dict[str, tuple[torch.Tensor, Vis]]
    pass_report: list[PassReport]
    vocab_size: int
    max_length: int


def to_dialect(
    model: nn.Module, config: CompileConfig, tokenizer: Any = None, *, cache: bool = True
) -> DialectProgram:
    """Capture one step, run the passes, check the result, and measure its ranges.

    Raises CompileError that names every op that has no protocol, before anything runs.
    """
    load_all()
    captured = capture(model, cache=cache)
    reports = rewrite(captured, config)
    graph_module = captured.graph_module
    annotate_visibility(graph_module, captured.inputs, captured.constants)
    verify_dialect(graph_module)
    sequences = config.calibration or _calibration(tokenizer, captured.vocab_size)
    annotate_ranges(graph_module, captured.inputs, sequences)
    return DialectProgram(
        graph_module,
        captured.inputs,
        captured.tensors(),
        reports,
        captured.vocab_size,
        min(captured.max_length or config.max_length, config.max_length),
    )


def rewrite(captured: Captured, config: CompileConfig) -> list[PassReport]:
    """Run the passes that `config` asks for on a captured graph, in place."""
    known = available()
    unknown = [name for name in config.disable if name not in known]
    if unknown:
        raise CompileError(f"unknown pass {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    chosen = [kind for name, kind in known.items() if kind.exact and name not in config.disable]
    info = GraphInfo(captured.inputs, captured.constants)
    return run_passes(captured.graph_module, info, ordered([*chosen, *config.extra_passes]))


def _calibration(tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Evenly spread token numbers, and a few sentences where there is a tokenizer."""
    step = max(1, vocab_size // _CALIBRATION_TOKENS)
    spread = [(i * step + i) % vocab_size for i in range(_CALIBRATION_TOKENS)]
    if tokenizer is None:
        return [spread, spread[::-1]]
    return [spread, *(tokenizer(text)["input_ids"][:_CALIBRATION_TOKENS] for text in _SENTENCES)]
