"""Rewrite `einsum` as one matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_public
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call, length


class ExpandEinsum(Pass):
    """Rewrites an einsum of two operands as a matrix product, which later passes recognize.

    Before:
        %q = input : shared 1x2xnewx8
        %k = input : shared 1x2xnewx8
        %1 = aten.einsum.default('bhid,bhjd->bhij', [%q, %k])
    After:
        %permute = aten.permute.default(%k, [0, 1, 3, 2])
        %matmul = aten.matmul.default(%q, %permute)
    """

    stage = "canonicalize"

    def run(self, graph_module: fx.GraphModule) -> int:
        found = [
            node
            for node in graph_module.graph.nodes
            if calls(node, aten.einsum.default) and not is_public(node)
        ]
        return sum(map(self._expand, found))

    def _expand(self, node: fx.Node) -> int:
        equation: str = node.args[0]  # type: ignore[assignment]
        operands: Any = node.args[1]
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        parts = inputs.split(",")
        if len(parts) != 2 or not arrow or "." in equation:
            self.skip(node, "a matrix product needs two operands with all dimensions named")
            return 0
        left, right = parts
        if any(len(set(part)) != len(part) for part in (left, right, output)):
            self.skip(node, "it takes a diagonal, which is not a matrix product")
            return 0
        batch = [d for d in left if d in right and d in output]
        inner = [d for d in left if d in right and d not in output]
        rows = [d for d in left if d not in right]
        columns = [d for d in right if d not in left]
        if not inner or set(output) != {*batch, *rows, *columns}:
            self.skip(node, "it sums over a dimension of one operand only, or over none of both")
            return 0
        factors = (
            _matrices(node, operands[0], left, batch, (rows, inner)),
            _matrices(node, operands[1], right, batch, (inner, columns)),
        )
        if None in factors:
            self.skip(node, "two of the dimensions to flatten have variable lengths")
            return 0
        result = insert_call(node, aten.matmul.default, *factors)
        made = [*batch, *rows, *columns]
        if (len(rows), len(columns)) != (1, 1):
            sizes = [
                length(node, operands[0], left.index(d))
                if d in left
                else length(node, operands[1], right.index(d))
                for d in made
            ]
            result = insert_call(node, aten.reshape.default, result, sizes)
        node.replace_all_uses_with(_permuted(node, result, [made.index(d) for d in output]))
        return 1


def _matrices(
    before: fx.Node, operand: fx.Node, names: str, batch: list[str], sides: Sequence[list[str]]
) -> fx.Node | None:
    """The operand as a batch of matrices."""
    order = [names.index(d) for group in (batch, *sides) for d in group]
    folded = []
    for group in sides:
        sizes = [operand.meta["val"].shape[names.index(d)] for d in group]
        folded.append(math.prod(sizes) if all(isinstance(s, int) for s in sizes) else -1)
    if folded == [-1, -1] and any(len(group) != 1 for group in sides):
        return None
    turned = _permuted(before, operand, order)
    if all(len(group) == 1 for group in sides):
        return turned
    shape = [*(length(before, operand, names.index(d)) for d in batch), *folded]
    return insert_call(before, aten.reshape.default, turned, shape)


def _permuted(before: fx.Node, node: fx.Node, order: list[int]) -> fx.Node:
    if order == list(range(len(order))):
        return node
    return insert_call(before, aten.permute.default, node, order)
