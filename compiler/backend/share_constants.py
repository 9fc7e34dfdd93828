"""Makes the server's constants shared, for `weights="shared"`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.ir import constant
from mergec.compiler.graph.visibility import annotate_visibility
from mergec.compiler.graph.weights import evaluate, insert_evaluated
from mergec.runtime.core.spec import Vis


def share_constants(captured: Captured) -> None:
    """Mark the server's constants as shared, and update the visibilities.

    Values that the server would compute from its constants in every step are computed at compile
    time, because on shares they would need a protocol. Requires and updates meta["vis"].
    """
    graph_module = captured.graph_module
    values: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            values[node] = constant(graph_module, node)
        elif _constant(node) and all(operand in values for operand in node.all_input_nodes):
            values[node] = evaluate(node, values.__getitem__)
    for node, value in values.items():
        held = isinstance(value, torch.Tensor) and node.meta["vis"] is Vis.SERVER
        if node.op != "get_attr" and held and any(user not in values for user in node.users):
            known = captured.constants
            folded = insert_evaluated(graph_module, node, "_shared", value, Vis.SERVER, known)
            node.replace_all_uses_with(folded, lambda user: user not in values)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    for name, vis in captured.constants.items():
        if vis is Vis.SERVER:
            captured.constants[name] = Vis.SHARED
    annotate_visibility(graph_module, captured.inputs, captured.constants)


def _constant(node: fx.Node) -> bool:
    """Whether a call on constants returns the same value in every step."""
    return node.op == "call_function" and node.meta["vis"] in (Vis.PUBLIC, Vis.SERVER)
