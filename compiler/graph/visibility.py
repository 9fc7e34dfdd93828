"""Visibility analysis: who knows each value in the clear. Changes no node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import fx

from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import Vis
from mergec.runtime.program.program import InputSpec


def annotate_visibility(
    graph_module: fx.GraphModule, inputs: Sequence[InputSpec], constants: Mapping[str, Vis]
) -> None:
    """Set meta["vis"] of every node, forward from the inputs and constants.

    A dialect op has its own rule; all other calls join their operands. Sizes are public.
    """
    specs = iter(inputs)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            node.meta["vis"] = next(specs).vis
        elif node.op == "get_attr":
            node.meta["vis"] = constants.get(str(node.target), Vis.PUBLIC)
        elif node.op == "call_function":
            node.meta["vis"] = visibility_of(node)


def visibility_of(node: fx.Node) -> Vis:
    """The visibility of a call, from those of its operands."""
    if node.target is torch.ops.aten.sym_size.int:
        return Vis.PUBLIC
    operands = [operand.meta["vis"] for operand in node.all_input_nodes]
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "mpc":
        return REGISTRY[node.target._schema.name.partition("::")[2]].visibility(*operands)
    return reduce(Vis.join, operands, Vis.PUBLIC)
