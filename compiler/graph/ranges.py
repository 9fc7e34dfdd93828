"""Range analysis: how large each value becomes on calibration tokens. Changes no node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mergec.compiler.config import Sample, as_pair
from mergec.compiler.errors import CompileError
from mergec.compiler.graph.extremes import extreme_positions, extreme_tokens
from mergec.compiler.graph.ir import bind, op_of
from mergec.compiler.graph.streams import streams
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis
from mergec.runtime.program.program import PADS, InputSpec, is_text

_DECODED = 2
"""Tokens at the end of each sequence that are fed one by one, after the rest as a prompt."""


def annotate_ranges(
    graph_module: fx.GraphModule,
    inputs: Sequence[InputSpec],
    sequences: Sequence[Sample],
    max_length: int = 0,
    *,
    tables: bool = True,
    pad: int = -1,
) -> None:
    """Set meta["range"] of every float value, and what dialect calls measure (`Op.measure`).

    Runs each token sequence through the graph in the clear: most of it as a prompt, the last tokens
    one by one. Prompts meet few rows of the model's tables, so the tokens with the most extreme
    rows follow as two more sequences, and single tokens at the most extreme positions below
    `max_length`; without `tables`, nothing follows. pad: the token that prompts are padded with;
    then each sequence is also run behind as many of these, or as many as fit. meta["range"] is the
    smallest and the largest number of a value. Values of residual streams also get meta["columns"],
    the smallest and the largest number of each column. Requires meta["vis"]. Raises CompileError
    that names the first secret value that is not finite.
    """
    recorder = _Recorder(graph_module)
    if pad >= 0:
        for sequence in sequences:
            tokens = as_pair(sequence).answer
            pads = min(len(tokens), (max_length or 2 * len(tokens)) - len(tokens))
            if pads > 0:
                replay(recorder, inputs, [(*[pad] * pads, *tokens)], decoded=_DECODED, pads=pads)
    if not tables:
        replay(recorder, inputs, sequences, decoded=_DECODED)
        return
    pairs = [as_pair(sample) for sample in sequences]
    first = pairs[0].source[:1]
    start = prompt(graph_module, inputs, first)
    extremes = extreme_tokens(graph_module, start)
    limit = max_length or max(max(len(pair.source), len(pair.answer)) for pair in pairs)
    more = [extremes[:limit], extremes[-limit:][::-1]] if extremes else []
    replay(recorder, inputs, [*sequences, *more], decoded=_DECODED)
    token = (extremes or first)[0]
    for position in extreme_positions(graph_module, start, max_length):
        _visit(recorder, inputs, token, position)


def _visit(
    recorder: fx.Interpreter, inputs: Sequence[InputSpec], token: int, position: int
) -> None:
    """Run one token at a position, after a cache of zeros; without a cache, after itself. The
    source of an encoder-decoder ends at that position, too."""
    *source, ids, caches, more = fed(inputs, prompt(recorder.module, inputs, [token]))
    source = [text.expand(1, position + 1) for text in source]
    if not caches:
        ids = ids.expand(1, position + 1)
    specs = [spec for spec in inputs if spec.vis is Vis.SHARED]
    sizes = [[position if isinstance(s, str) else s for s in spec.shape] for spec in specs]
    past = [cache.new_zeros(()).expand(size) for cache, size in zip(caches, sizes, strict=True)]
    with torch.inference_mode():
        recorder.run(*source, ids, *past, *more)


def replay(
    interpreter: fx.Interpreter,
    inputs: Sequence[InputSpec],
    sequences: Sequence[Sample],
    decoded: int = 0,
    pads: int = 0,
) -> None:
    """Run each sequence through a graph in the clear, with an interpreter that records values.

    The last `decoded` tokens are fed one by one, with the cache of the tokens before, which are fed
    as a prompt. An encoder-decoder answers each sequence by the sequence itself, and the source of
    a pair by its answer. pads: how many of the first tokens are padding, in a program that takes
    this number.
    """
    for sequence in sequences:
        given = prompt(interpreter.module, inputs, sequence, pads)
        *source, ids, caches, more = fed(inputs, given)
        size = ids.shape[1]
        cut = max(1, size - decoded) if caches else size
        pieces = [ids[:, :cut], *(ids[:, i : i + 1] for i in range(cut, size))]
        with torch.inference_mode():
            for piece in pieces:
                found = interpreter.run(*source, piece, *caches, *more)
                caches = list(found[1 : 1 + len(caches)])


def fed(inputs: Sequence[InputSpec], given: Sequence[torch.Tensor]) -> list[Any]:
    """A graph's inputs as texts, one after the other, a list of caches, and a list of the rest."""
    texts = sum(map(is_text, inputs))
    caches = texts + sum(spec.vis is Vis.SHARED for spec in inputs)
    return [*given[:texts], list(given[texts:caches]), list(given[caches:])]


def prompt(
    module: Any, inputs: Sequence[InputSpec], sample: Sample, pads: int = 0
) -> list[torch.Tensor]:
    """A graph's inputs for a whole sample: the tokens [1, N], and empty caches. A sequence is the
    source of an encoder-decoder, and what it has answered as well. pads: see `replay`."""
    pair = as_pair(sample)
    texts = iter([pair.source, pair.answer][-sum(map(is_text, inputs)) :])
    dtype = next((p.dtype for p in module.parameters()), None)
    dtype = dtype or next(b.dtype for b in module.buffers() if b.is_floating_point())
    return [
        torch.tensor([pads])
        if spec.name == PADS
        else torch.tensor([list(next(texts))], dtype=torch.int64)
        if is_text(spec)
        else torch.zeros([0 if isinstance(s, str) else s for s in spec.shape], dtype=dtype)
        for spec in inputs
    ]


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        # The traceback would be appended to error messages.
        self.extra_traceback = False
        carried: list[Any] = [n for n in module.graph.nodes if n.target is target("carry")]
        self._entering, self._leaving = carried or [None, None]
        self._hidden: Any = None
        self._streams = {node for stream in streams(module.graph) for node in stream.values}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder" and result.numel() == 0:
            self._hidden = None  # Nothing is cached yet: a prompt.
        if n is self._entering and self._hidden is not None:
            # The next step's input is not the token's row, but the previous hidden state.
            result = self._hidden
        elif n is self._leaving:
            self._hidden = result
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel():
            ends = float(result.min()), float(result.max())
            if not all(map(math.isfinite, ends)) and n.meta["vis"] is not Vis.PUBLIC:
                # A public mask may contain -inf.
                raise CompileError("a value is not finite in calibration", {n: self._reason(n)})
            least, most = n.meta.get("range", ends)
            n.meta["range"] = min(least, ends[0]), max(most, ends[1])
            if n in self._streams:
                rows = result.double().reshape(-1, result.shape[-1])
                columns = rows.amin(0), rows.amax(0)
                lows, highs = n.meta.get("columns", columns)
                n.meta["columns"] = torch.minimum(lows, columns[0]), highs.maximum(columns[1])
        op = op_of(n)
        if op is not None:
            arguments = fx.map_arg(bind(op, n), self.env.__getitem__)
            for name, value in op.measure(arguments).items():
                n.meta[name] = max(value, n.meta.get(name, value))
        return result

    def _reason(self, n: fx.Node) -> str:
        """Why a value is not finite. Secret operands are: they were looked at before."""
        for operand in n.all_input_nodes:
            value = self.env[operand]
            if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
                return (
                    "a public operand contains inf, which secret numbers cannot; use a large "
                    "number instead, such as -10000 in a mask"
                )
        return (
            "its operands are finite, but the result contains inf or NaN; disable a lossy pass, or "
            "calibrate with other prompts"
        )
