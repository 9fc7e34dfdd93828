"""Refuses programs that compute something else behind padding than without it.

What the client hides (`passes.pad_prompt`) is keys. Values that follow from lengths are public and
count the padding, so they must depend on differences of positions alone. For masks this is compared
at every length. Everything else is compared by running the graph with and without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mergec.compiler.config import MAX_LENGTH, Sample, as_pair
from mergec.compiler.errors import CompileError
from mergec.compiler.graph.contract import Wide
from mergec.compiler.graph.extremes import evaluated
from mergec.compiler.graph.ir import bind, is_public, is_shared, op_of
from mergec.compiler.graph.ranges import fed, prompt
from mergec.runtime.core.op import Kind
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops.attention import MASKED_SCORE
from mergec.runtime.program.program import InputSpec

TOLERANCE = 1e-6
"""Relative to the largest logit, in float64; public tables may be float32."""

_TOKENS = 12
"""Tokens of the prompt that is compared."""

_MOST_PADS = 96
"""What is compared at every length, in masks, need not be compared in whole runs."""

_REMEDY = "prompts cannot be padded for this model; leave out pad_prompt"


def check_padding(
    graph_module: fx.GraphModule,
    inputs: Sequence[InputSpec],
    sequences: Sequence[Sample],
    pad: int,
    max_length: int,
) -> None:
    """Raise CompileError, which names a node, if padding would change what the graph computes.

    graph_module: in the dialect, with the number of padded tokens as its last input; needs
    meta["vis"]. pad: the token that is put before the first of `sequences`. max_length: most tokens
    of a padded prompt and its answer.
    """
    length = max_length or MAX_LENGTH
    _check_masks(graph_module, inputs, length)
    tokens = list(as_pair(sequences[0]).answer)[: min(_TOKENS, max(1, length - 2))]
    most = min(_MOST_PADS, length - len(tokens))
    for pads in {1, most} if most > 0 else ():
        with_it, without = (
            list(_runs(graph_module, inputs, [*[pad] * count, *tokens], count))
            for count in (pads, 0)
        )
        for one, other in zip(with_it, without, strict=True):
            _compare(graph_module, one, other)


def _check_masks(graph_module: fx.GraphModule, inputs: Sequence[InputSpec], length: int) -> None:
    """Compare the last row of each public mask, and of each bias of the server's, with the row of
    the token before: it must be the same, one key further on."""
    masks: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        op = op_of(node)
        if op is not None and op.kind is Kind.ATTENTION:
            given = bind(op, node)
            known = [given.get(name) for name in ("mask", "bias")]
            for value in known:
                if isinstance(value, fx.Node) and not is_shared(value):
                    masks.setdefault(value, node)
    if not masks:
        return
    before: dict[fx.Node, torch.Tensor] = {}
    for past in range(length):
        values = _shapes(graph_module, inputs, past)
        for mask, node in masks.items():
            found = evaluated(graph_module, mask, values, public=True)
            row = torch.atleast_2d(found)[..., -1:, :].double()
            if mask in before and not _goes_on(before[mask], row):
                reason = (
                    f"its mask depends on where the text begins: a token after {past} others sees "
                    f"not what one after {past - 1} sees"
                )
                raise CompileError(_REMEDY, {node: reason})
            before[mask] = row


def _shapes(
    graph_module: fx.GraphModule, inputs: Sequence[InputSpec], past: int
) -> dict[fx.Node, Any]:
    """Inputs of a step of one token after `past`, without data; without caches, of the text as a
    whole."""
    cached = any(spec.vis is Vis.SHARED for spec in inputs)
    lengths = (1, past) if cached else (past + 1, 0)
    places = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    found: dict[fx.Node, Any] = {}
    for node, spec in zip(places, inputs, strict=True):
        dtype = node.meta["val"].dtype
        found[node] = torch.empty(spec.shape_of(*lengths), dtype=dtype, device="meta")
    return found


def _goes_on(before: torch.Tensor, row: torch.Tensor) -> bool:
    """Whether a row [..., 1, L + 1] of a mask is the one before, [..., 1, L], one key further on.

    What a row adds to all of its scores does not count.
    """
    if row.shape[-1] == 1:
        return True
    seen, was = row[..., 1:] > MASKED_SCORE, before > MASKED_SCORE
    if not torch.equal(seen, was):
        return False
    moved = (row[..., 1:] - before).where(seen, torch.nan)
    middle = moved.nanmean(-1, keepdim=True)
    scale = before.where(was, 0.0).abs().max().clamp(min=1.0)
    return bool(((moved - middle).abs().nan_to_num() <= TOLERANCE * scale).all())


def _runs(
    graph_module: fx.GraphModule, inputs: Sequence[InputSpec], tokens: Sequence[int], pads: int
) -> Iterator[dict[str, torch.Tensor]]:
    """All values of a prompt, and of its last token after the others, by name."""
    ids, caches, more = fed(inputs, prompt(graph_module, inputs, tokens, pads))
    caches = [cache.double() for cache in caches]
    pieces = [ids]
    if caches and ids.shape[1] > pads + 1:
        pieces = [ids[:, :-1], ids[:, -1:]]
    for piece in pieces:
        recorder = Wide(graph_module)
        with torch.no_grad():
            found = recorder.run(piece, *caches, *more)
        caches = list(found[1 : 1 + len(caches)])
        yield recorder.values


def _compare(
    graph_module: fx.GraphModule, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> None:
    """Raise CompileError if logits differ, which names the first attention or sum that does."""
    if _equal(one["output 0"], other["output 0"]):
        return
    # Rotated rows and caches differ in any case: only differences of their positions count.
    plain = (Kind.ATTENTION, Kind.ARITHMETIC, Kind.LINEAR)
    for node in graph_module.graph.nodes:
        op = op_of(node)
        known = node.name in one and node.name in other
        if op is None or op.kind not in plain or not known or is_public(node):
            continue
        if op.name not in ("rotary", "scale") and not _equal(one[node.name], other[node.name]):
            raise CompileError(_REMEDY, {node: "behind padding it computes something else"})
    raise CompileError(f"{_REMEDY}: behind padding its logits are others")


def _equal(padded: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether the last entries of a value, along each dimension that padding makes longer, are
    those without."""
    for dim, size in enumerate(plain.shape):
        if padded.shape[dim] > size:
            padded = padded.narrow(dim, padded.shape[dim] - size, size)
    scale = max(1.0, float(plain.abs().max())) if plain.numel() else 1.0
    return bool((padded.double() - plain.double()).abs().max() <= TOLERANCE * scale)
