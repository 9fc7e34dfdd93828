"""Remove calls that return their operand unchanged: copies, casts between float types, dropout."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import aten, calls, constant
from mergec.compiler.graph.rewriting import Pass

_ALWAYS = (
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default,
    aten.detach_.default, aten.dropout.default, aten.lift_fresh_copy.default,
)  # fmt: skip
_CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
    aten.type_as.default,
)  # fmt: skip
_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)


class RemoveNoops(Pass):
    """Removes copies, dropout and casts between float types, which mean nothing in fixed point.

    Before:
        %x = input : shared 1xnewx8
        %empty = constant : public 0
        %1 = aten.to.dtype(%x, torch.float32)
        %2 = aten.cat.default([%empty, %1], 1)
        %3 = aten.slice.Tensor(%2, 1, 0, end)
        %4 = aten.relu.default(%3)
    After:
        %4 = aten.relu.default(%x)
    """

    stage = "canonicalize"

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if calls(node, *_CHECKS):
                graph_module.graph.erase_node(node)
                sites += 1
                continue
            operand = self._same_as(graph_module, node)
            if operand is not None:
                for user in node.users:
                    # Without the copy the memory order may differ, which `view` does not accept.
                    if calls(user, aten.view.default):
                        user.target = aten.reshape.default
                node.replace_all_uses_with(operand)
                graph_module.graph.erase_node(node)
                sites += 1
        return sites

    def _same_as(self, graph_module: fx.GraphModule, node: Any) -> fx.Node | None:
        if (
            calls(node, *_ALWAYS)
            or (calls(node, *_CASTS) and _both_float(node))
            or (calls(node, aten.slice.Tensor) and _whole(node))
        ):
            operand = node.args[0]
        elif calls(node, aten.cat.default):
            parts = [part for part in node.args[0] if not _empty(graph_module, part)]
            operand = parts[0] if len(parts) == 1 else None
        else:
            return None
        return operand if isinstance(operand, fx.Node) else None


def _both_float(node: fx.Node) -> bool:
    source = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    result = node.meta.get("val")
    return (
        isinstance(source, torch.Tensor)
        and isinstance(result, torch.Tensor)
        and (
            source.dtype == result.dtype
            or (source.is_floating_point() and result.is_floating_point())
        )
    )


def _whole(node: Any) -> bool:
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    if step != 1:
        return False
    if start in (None, 0) and end in (None, sys.maxsize):
        return True
    before, after = (str(value.meta["val"].shape) for value in (node.args[0], node))
    return before == after


def _empty(graph_module: fx.GraphModule, node: Any) -> bool:
    while calls(node, *_ALWAYS):
        node = node.args[0]
    value = constant(graph_module, node)
    if value is None:
        value = node.meta.get("val")
    return value is not None and any(isinstance(size, int) and size == 0 for size in value.shape)
