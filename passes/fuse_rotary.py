"""Recognize rotary position embeddings."""

from __future__ import annotations

import sys
from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_public, is_shared, last_dim, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target


class FuseRotary(Pass):
    """Fuses rotary position embedding, eight ops, into one linear map of each share; sends nothing.

    Features are paired by halves (llama) or as neighbours (gptj). Features beyond the width of the
    tables stay unchanged (phi).

    Before:
        %x = input : shared 1x2xnewx8
        %cos = input : public newx8
        %sin = input : public newx8
        %1 = aten.slice.Tensor(%x, 3, 0, 4)
        %2 = aten.slice.Tensor(%x, 3, 4, end)
        %3 = aten.neg.default(%2)
        %4 = aten.cat.default([%3, %1], -1)
        %5 = aten.mul.Tensor(%x, %cos)
        %6 = aten.mul.Tensor(%4, %sin)
        %7 = aten.add.Tensor(%5, %6)
    After:
        %7 = mpc.rotary(%x, %cos, %sin, False)
    """

    stage = "fuse"

    def run(self, graph_module: fx.GraphModule) -> int:
        return sum(self._fuse(node) for node in list(graph_module.graph.nodes))

    def _fuse(self, node: fx.Node) -> int:
        if not calls(node, aten.add.Tensor) or not all(
            calls(arg, aten.mul.Tensor) for arg in node.args
        ):
            return 0
        for direct, turned in (node.args, node.args[::-1]):
            first, second = _by_table(direct), _by_table(turned)
            if first is None or second is None:
                continue
            (x, cos), (other, sin) = first, second
            interleaved = _quarter_turn(other, x)
            if interleaved is None:
                continue
            if any(table.meta["val"].shape[-1] != x.meta["val"].shape[-1] for table in (cos, sin)):
                self.skip(node, "its tables are not as wide as its operand")
                continue
            whole, root = _with_rest(node, x)
            replace(whole, target("rotary"), (root, cos, sin, interleaved))
            return 1
        return 0


def _by_table(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """A secret factor and a public tensor."""
    for secret, table in (node.args, node.args[::-1]):
        if is_shared(secret) and isinstance(table, fx.Node) and is_public(table):
            return secret, table
    return None


def _quarter_turn(node: Any, x: fx.Node) -> bool | None:
    """None if `node` is not x with its pairs rotated; else whether the pairs are neighbours."""
    size = x.meta["val"].shape[-1]
    if calls(node, aten.cat.default) and len(node.args[0]) == 2:
        negated, first = node.args[0]
        if calls(negated, aten.neg.default) and last_dim(node, _cat_dim(node)):
            halves = _slice(negated.args[0], x) == (size // 2, size, 1)
            return False if halves and _slice(first, x) == (0, size // 2, 1) else None
    if calls(node, aten.reshape.default) and calls(node.args[0], aten.stack.default):
        stacked = node.args[0]
        parts = stacked.args[0]
        if len(parts) == 2 and calls(parts[0], aten.neg.default) and stacked.args[1] == -1:
            odd = _slice(parts[0].args[0], x) == (1, size, 2)
            return True if odd and _slice(parts[1], x) == (0, size, 2) else None
    return None


def _cat_dim(node: Any) -> int:
    return node.args[1] if len(node.args) > 1 else 0


def _slice(node: Any, x: fx.Node) -> tuple[int, int, int] | None:
    """start, stop, step of a slice of x's last dimension."""
    if not calls(node, aten.slice.Tensor) or node.args[0] is not x or not last_dim(x, node.args[1]):
        return None
    size = x.meta["val"].shape[-1]
    given: list[Any] = [*node.args[2:], *(None, None, 1)[len(node.args) - 2 :]]
    start, stop, step = given
    stop = size if stop is None or stop == sys.maxsize else stop
    return start or 0, min(stop, size), step


def _with_rest(node: Any, x: Any) -> tuple[fx.Node, fx.Node]:
    """The concatenation with the unrotated features and the whole input; node and x without any."""
    if len(node.users) == 1 and calls(x, aten.slice.Tensor):
        (user,) = node.users
        root = x.args[0]
        size = x.meta["val"].shape[-1]
        if calls(user, aten.cat.default) and len(user.args[0]) == 2 and user.args[0][0] is node:
            rest = user.args[0][1]
            whole = root.meta["val"].shape[-1]
            starts = _slice(x, root) == (0, size, 1)
            if starts and _slice(rest, root) == (size, whole, 1):
                return user, root
    return node, x
