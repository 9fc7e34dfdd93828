"""Evaluate once what is public and depends on no length."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compiler.ir import constant, is_public
from compiler.shapes import insert_constant
from compiler.weights import pure
from passes.base import Pass
from runtime.spec import Vis

LARGEST = 1 << 16
"""Elements of a folded constant: a larger one is cheaper made in each step than kept by all."""


class FoldPublic(Pass):
    """Frequencies, scales and fillings become constants; what depends on lengths is left.

    Before:
        %1 = aten.arange.start_step(0, 64, 2)
        %2 = aten.div.Tensor(%1, 64)
        %3 = aten.pow.Scalar(10000.0, %2)
        %4 = aten.outer.default(%positions, %3)
    After:
        %4 = aten.outer.default(%positions, %_folded_0)
    """

    stage = "canonicalize"
    after = ("expand_composites", "expand_sdpa", "publish_masks", "unify_spellings")

    def run(self, graph_module: fx.GraphModule) -> int:
        values: dict[fx.Node, Any] = {}
        for node in graph_module.graph.nodes:
            if node.op == "get_attr" and is_public(node):
                value = constant(graph_module, node)
                if value is not None:
                    values[node] = value
            elif (
                is_public(node)
                and pure(node)
                and all(operand in values for operand in node.all_input_nodes)
            ):
                values[node] = _evaluate(node, values)
        sites = 0
        for node, value in values.items():
            if node.op == "get_attr" or not isinstance(value, torch.Tensor):
                continue
            if all(user in values for user in node.users):
                continue
            if value.numel() > LARGEST:
                self.skip(node, f"its value is large: {value.numel()} elements")
                continue
            self._fold(graph_module, node, value)
            sites += 1
        return sites

    def _fold(self, graph_module: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> None:
        taken = self.info.constants
        name = next(n for i in range(len(taken) + 1) if (n := f"_folded_{i}") not in taken)
        taken[name] = Vis.PUBLIC
        # A view would carry its whole storage into the bundles.
        folded = insert_constant(graph_module, node, name, value.detach().clone())
        node.replace_all_uses_with(folded)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: values[operand])
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
