"""Lets a step give logits at all its positions where drafted tokens are checked."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource

from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.ir import aten, calls
from mergec.compiler.graph.shapes import ROWS, evaluate, fake_mode
from mergec.runtime.core.spec import Vis

_HINT = 2
"""An example of it that is no other length's; torch takes sizes of 0 and 1 for granted."""


def keep_drafts(captured: Captured, most: int) -> None:
    """Give logits at the last `rows` positions of a step instead of at the last one, in place.

    rows is `new` for a step of up to `most` drafted tokens and the one before them that follows
    cached ones, and 1 for any other step. It is computed from these lengths by arithmetic that
    programs have anyway, so requests of steps stay what they are. A prompt runs the head over its
    last position, and a step of one token costs what it cost. Raises CompileError for a step
    without caches, and for a model that decides by the number of logits.
    """
    if not captured.cached:
        raise CompileError(
            "speculate_up_to needs a decoder with a cache, which this model does not have; leave "
            "it out"
        )
    graph = captured.graph_module.graph
    (output,) = [node for node in graph.nodes if node.op == "output"]
    tail, selections = _selected(output.args[0][0])
    if not selections:
        raise CompileError(
            "speculate_up_to needs a model whose last logits are selected from those of all "
            "positions; leave it out"
        )
    start = _start(captured, most)
    for node in [node for node in graph.nodes if node in tail]:
        if node in selections:
            node.args = (node.args[0], node.args[1], start, sys.maxsize)
        elif _last_of(node) is not None:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        try:
            mode = fake_mode(graph)
            node.meta["val"] = evaluate(node.target, node.args, node.kwargs, mode)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = "it takes the logits of one position alone; compile without speculate_up_to"
            raise CompileError("drafts cannot be checked", {node: reason}) from error
    captured.graph_module.recompile()


def _start(captured: Captured, most: int) -> fx.Node:
    """A node that computes -rows, after the graph's inputs."""
    graph = captured.graph_module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    # The source of an encoder-decoder comes before the tokens of its answer.
    ids, cache = inputs[captured.encodes :][:2]
    env = ids.meta["val"].shape[1].node.shape_env
    source = ConstantSource(ROWS)
    length = env.create_symintnode(env.create_symbol(_HINT, source), hint=_HINT, source=source)
    made = [inputs[-1]]

    def call(target: Callable[..., Any], *args: Any, value: Any = None) -> fx.Node:
        with graph.inserting_after(made[-1]):
            node = graph.call_function(target, args)
        if value is None:
            value = target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
        node.meta |= {"val": value, "vis": Vis.PUBLIC, "module": "", "source": ""}
        made.append(node)
        return node

    new = call(aten.sym_size.int, ids, 1)
    past = call(aten.sym_size.int, cache, 2)
    # 1 for up to `most` drafts and the token before them, and 0 for more.
    short = call(operator.sub, most + 2, new)
    short = call(torch.sym_max, 0, call(torch.sym_min, 1, short))
    # 1 behind cached tokens, and 0 for a prompt.
    behind = call(torch.sym_min, 1, past)
    drafts = call(operator.mul, call(operator.mul, short, behind), call(operator.sub, new, 1))
    rows = call(operator.add, drafts, 1, value=length)
    rows.meta["length"] = ROWS
    return call(operator.neg, rows)


def _selected(logits: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """All that follows the selection of the last position, and the selections themselves."""
    tail: set[fx.Node] = set()
    selections: set[fx.Node] = set()
    asked = [logits]
    while asked:
        node = asked.pop()
        if node in tail or node.op != "call_function":
            continue
        tail.add(node)
        dim = _last_of(node)
        source: Any = node.args[0] if node.args else None
        if dim is not None and not isinstance(source.meta["val"].shape[dim], int):
            selections.add(node)
        else:
            asked += node.all_input_nodes
    return tail, selections


def _last_of(node: fx.Node) -> int | None:
    """The dimension whose last entry a node selects; None if it selects nothing else."""
    if not calls(node, aten.slice.Tensor) or len(node.args) < 3 or len(node.args) > 4:
        return None
    dim, start, end = [*node.args[1:], None][:3]
    return dim if start == -1 and end in (None, sys.maxsize) else None  # type: ignore[return-value]
