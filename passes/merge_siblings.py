"""Merge the linear layers that take the same input."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import aten, calls, insert
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import evaluate, fake_mode
from mergec.compiler.graph.weights import computable, drop_replaced, insert_folded, uses, wide
from mergec.runtime.core.op import target


class MergeSiblings(Pass):
    """Merges queries, keys and values, gate and up, or a parallel MLP with these, into one product.

    The input is sent once in any case, so bytes and rounds do not change. The pass saves local
    work: one matrix product instead of two to four, one static mask, one message at the start of a
    session, one dealt product, and a single truncation if all parts are truncated alike. Each part
    keeps the fractional bits that its own result has room for (`compiler.backend.legalize`), so
    nothing is rounded more than in a separate product.

    A matrix that is also used elsewhere is left out: its copy would be opened once more at the
    start of a session.

    Before:
        %x = input : shared 1xnewx8
        %w = constant : server 5x8
        %b = constant : server 5
        %v = constant : server 4x8
        %1 = mpc.linear(%x, %w, %b)
        %2 = mpc.linear(%x, %v, None)
    After:
        %w_folded = constant : server 9x8
        %b_folded = constant : server 9
        %linear = mpc.linear(%x, %w_folded, %b_folded)
        %slice = aten.slice.Tensor(%linear, -1, 0, 5)
        %slice.2 = aten.slice.Tensor(%linear, -1, 5, 9)
    """

    stage = "optimize"
    # The last layer's queries read only the last position, so they are not siblings of its keys.
    # And once siblings are merged, a layer behind one of them no longer follows it directly.
    after = (
        "fold_norm_affine",
        "fold_attention_scale",
        "fold_scalars",
        "hoist_last_position",
        "merge_chains",
    )

    def run(self, graph_module: fx.GraphModule) -> int:
        children: dict[fx.Node, list[fx.Node]] = {}
        for node in graph_module.graph.nodes:
            if calls(node, target("linear")):
                children.setdefault(node.args[0], []).append(node)
        sites = 0
        for siblings in children.values():
            if len(siblings) < 2:
                continue
            fit = [node for node in siblings if self._fits(graph_module, node)]
            if len(fit) > 1:
                self._merge(graph_module, fit)
                sites += 1
        return sites

    def _fits(self, graph_module: fx.GraphModule, linear: fx.Node) -> bool:
        _, weight, bias = _operands(linear)
        given = [node for node in (weight, bias) if node is not None]
        if not all(computable(graph_module, node) for node in given):
            self.skip(linear, "its matrix or bias is not a constant of 32 bits or more")
        elif any(user is not linear for user in uses(graph_module, weight)):
            self.skip(linear, "its matrix is also used elsewhere, so it would be stored twice")
        else:
            return True
        return False

    def _merge(self, graph_module: fx.GraphModule, linears: list[fx.Node]) -> None:
        """Insert one product and its parts at the first of the layers."""
        first = linears[0]
        matrices, biases, given = [], [], []
        for linear in linears:
            _, weight, bias = _operands(linear)
            matrices.append(wide(graph_module, weight))
            zero = torch.zeros(len(matrices[-1]), dtype=torch.float64)
            biases.append(zero if bias is None else wide(graph_module, bias))
            given += [] if bias is None else [bias]
        x, origin, _ = _operands(first)
        known = self.info.constants
        weight = insert_folded(graph_module, first, origin, torch.cat(matrices), known)
        bias = None
        if given:
            bias = insert_folded(graph_module, first, given[0], torch.cat(biases), known)
        mode = fake_mode(graph_module.graph)
        val = evaluate(aten.cat.default, (linears, -1), {}, mode)
        whole = insert(first, first.target, (x, weight, bias), val, first.meta["vis"])
        whole.meta["module"] = _common([str(linear.meta.get("module", "")) for linear in linears])
        start = 0
        for linear, matrix in zip(linears, matrices, strict=True):
            end = start + len(matrix)
            args = (whole, -1, start, end)
            part = insert(first, aten.slice.Tensor, args, linear.meta["val"], linear.meta["vis"])
            part.meta |= {key: linear.meta.get(key, "") for key in ("module", "source")}
            linear.replace_all_uses_with(part)
            start = end
        for linear in linears:
            drop_replaced(graph_module, linear, known)


def _common(modules: list[str]) -> str:
    """The innermost module that contains all of these."""
    paths = [module.split(".") for module in modules]
    kept = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in kept)


def _operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    return (*linear.args, None)[:3]  # type: ignore[return-value]
