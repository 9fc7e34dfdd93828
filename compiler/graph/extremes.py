"""The tokens and positions whose rows of a table are the most extreme: what else to calibrate on.

Prompts meet few rows of a table, but the whole table is known when a model is compiled. So ranges
are also measured on the rows that stand out: those with the largest and smallest norms, the largest
entries, and the largest entries relative to their norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import ancestors, aten, calls, constant
from mergec.compiler.graph.weights import evaluate
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis
from mergec.runtime.program.program import PADS

_TOKENS = 4
"""Rows per criterion; there are four."""

_POSITIONS = 2
"""The same for tables of positions, each of which takes a step of its own."""


def extreme_tokens(graph_module: fx.GraphModule, start: Sequence[torch.Tensor]) -> list[int]:
    """The tokens with the most extreme rows, of every table that is read by token; none twice.

    At most 16 for each table, those with large rows first. start: the graph's inputs for one token
    and empty caches. Requires meta["vis"].
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    given: dict[fx.Node, Any] = dict(zip(inputs, start, strict=True))
    found: list[list[int]] = []
    for node in graph_module.graph.nodes:
        table, index = _lookup(graph_module, node)
        if table is None or index is None or index.meta.get("vis") is not Vis.CLIENT:
            continue
        if by_position(index):
            continue
        # Some models read a table at an offset, or by a part of the token's number.
        tokens = torch.arange(len(table))[None]
        texts = [node for node in inputs if node.meta["vis"] is Vis.CLIENT]
        values = given | {text: tokens for text in texts if text.meta.get("name") != PADS}
        rows = evaluated(graph_module, index, values).reshape(-1)
        used = (rows >= 0) & (rows < len(table))
        numbers, read = torch.arange(len(rows))[used], rows[used]
        # Most models read row n for token n; a copy of a table may be a tenth of the model.
        whole = torch.equal(read, torch.arange(len(table)))
        chosen = numbers[_extreme_rows(table if whole else table[read], _TOKENS)]
        norms = table[rows[chosen]].float().norm(dim=-1)
        found.append(chosen[norms.argsort(descending=True)].tolist())
    return list(dict.fromkeys(chain.from_iterable(found)))


def extreme_positions(
    graph_module: fx.GraphModule, start: Sequence[torch.Tensor], limit: int
) -> list[int]:
    """The positions below `limit` with the most extreme rows of a table that is read by position.

    Such a table has rows that are chosen by public numbers, less padding if there is any, or is cut
    off at a length. At most 8 for each table. start: the graph's inputs for one token and empty
    caches. Requires meta["vis"].
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(inputs, start, strict=True))
    found: list[int] = []
    longest = limit
    for node in graph_module.graph.nodes:
        table, index = _lookup(graph_module, node)
        public = index is None or index.meta.get("vis") is Vis.PUBLIC or by_position(index)
        if table is None or not public:
            continue
        # OPT leaves the first two rows of its table unused.
        first = 0 if index is None else int(evaluated(graph_module, index, values).reshape(-1)[0])
        longest = min(longest, len(table) - first)
        found += _extreme_rows(table[first : first + limit], _POSITIONS)
    return sorted({position for position in found if position < longest})


def by_position(index: fx.Node) -> bool:
    """Whether the client's row numbers are positions behind its padding (`passes.pad_prompt`)."""
    return any(node.meta.get("name") == PADS for node in ancestors(index))


def evaluated(
    graph_module: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, Any],
    *,
    public: bool = False,
) -> Any:
    """The value of a node in the clear, from those of the inputs; also kept in `values`.

    public: no secret decides it. Of those, which only lengths are read off, there are shapes alone.
    Requires meta["vis"].
    """

    def given(current: fx.Node, operand: fx.Node) -> Any:
        value, secret = values[operand], current.meta.get("vis") in (Vis.SHARED, Vis.CLIENT)
        return value.to("meta") if public and secret and isinstance(value, torch.Tensor) else value

    pending = [node]
    while pending:
        current = pending[-1]
        missing = [operand for operand in current.all_input_nodes if operand not in values]
        if current in values or not missing:
            pending.pop()
        if current not in values and not missing:
            held = constant(graph_module, current)
            values[current] = evaluate(current, partial(given, current)) if held is None else held
        pending += missing
    return values[node]


def _lookup(
    graph_module: fx.GraphModule, node: fx.Node
) -> tuple[torch.Tensor | None, fx.Node | None]:
    """The table [rows, features] that a call reads rows of, and their numbers; None if it does not.

    The numbers are None for a table that is cut off at a symbolic length.
    """
    index: Any = None
    if calls(node, aten.embedding.default):
        table, index = node.args[:2]
    elif calls(node, target("embedding")):
        index, table = node.args[:2]
    elif calls(node, aten.slice.Tensor) and isinstance(node.args[-1], fx.Node):
        table = node.args[0]
    else:
        return None, None
    found = constant(graph_module, table)
    if found is None or not found.is_floating_point() or not isinstance(table, fx.Node):
        return None, None
    if table.meta.get("vis") is Vis.PUBLIC or found.dim() < 2:
        return None, None
    return found.reshape(-1, found.shape[-1]), index


def _extreme_rows(table: torch.Tensor, count: int) -> list[int]:
    """The numbers of the most extreme rows, the first of each criterion first."""
    norms = table.float().norm(dim=-1)
    largest = torch.maximum(table.amax(-1), -table.amin(-1)).float()
    present = norms > 0
    if not bool(present.any()):
        return []
    peaked = torch.where(present, largest / norms, 0.0)
    smallest = torch.where(present, -norms, -torch.inf)
    count = min(count, int(present.sum()))
    orders = [scores.topk(count).indices.tolist() for scores in (norms, largest, smallest, peaked)]
    ranked = chain.from_iterable(zip_longest(*orders))
    return list(dict.fromkeys(row for row in ranked if row is not None))
