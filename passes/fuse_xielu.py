"""Recognize xIELU, the activation of Apertus, whose coefficients are learned."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from mergec.compiler.graph.ir import aten, calls, constant, is_shared
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call
from mergec.runtime.core.op import target

_EPS = 1e-5
"""Largest size of the number below which xIELU cuts off; Apertus has 1e-6."""


class FuseXielu(Pass):
    """Writes xIELU with ops that have protocols: a ReLU's square and an ELU, times coefficients.

    xIELU(x) is p x**2 + b x above zero and n (expm1(min(x, eps)) - x) + b x below, with p, n and b
    learned, one of each per layer (Huang and Schlag, arXiv 2411.13010). As ELU(x) - x is
    expm1(x) - x below zero and 0 above, it is p max(x, 0) x + n (ELU(x) - x) + b x everywhere, up
    to n times the size of eps, which is far below the last fractional bit. The coefficients stay
    with the server: they meet x under a static mask, as every weight does. Each party sees what it
    sees in `mpc.glu`, `mpc.elu` and `mpc.mul`.

    Before:
        %x = input : shared 1xnewx8
        %p = constant : server 1
        %n = constant : server 1
        %b = constant : server scalar
        %eps = constant -1e-06 : server scalar
        %1 = aten.gt.Scalar(%x, 0)
        %2 = aten.mul.Tensor(%p, %x)
        %3 = aten.mul.Tensor(%2, %x)
        %4 = aten.mul.Tensor(%b, %x)
        %5 = aten.add.Tensor(%3, %4)
        %6 = aten.min.other(%x, %eps)
        %7 = aten.expm1.default(%6)
        %8 = aten.sub.Tensor(%7, %x)
        %9 = aten.mul.Tensor(%8, %n)
        %10 = aten.mul.Tensor(%b, %x)
        %11 = aten.add.Tensor(%9, %10)
        %12 = aten.where.self(%1, %5, %11)
    After:
        %mul = aten.mul.Tensor(%x, %p)
        %glu = mpc.glu(%x, %mul, 'relu')
        %elu = mpc.elu(%x)
        %sub = aten.sub.Tensor(%elu, %x)
        %mul.2 = aten.mul.Tensor(%sub, %n)
        %mul.3 = aten.mul.Tensor(%x, %b)
        %add = aten.add.Tensor(%glu, %mul.2)
        %add.2 = aten.add.Tensor(%add, %mul.3)
    """

    stage = "fuse"

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if not calls(node, aten.where.self) or not is_shared(node):
                continue
            x = _above_zero(node.args[0])
            if x is None:
                continue
            found = self._match(node, x, graph_module)
            if found is None:
                continue
            p, n, b = found
            up = insert_call(node, aten.mul.Tensor, x, p)
            above = insert_call(node, target("glu"), x, up, "relu")
            elu = insert_call(node, target("elu"), x)
            gap = insert_call(node, aten.sub.Tensor, elu, x)
            below = insert_call(node, aten.mul.Tensor, gap, n)
            line = insert_call(node, aten.mul.Tensor, x, b)
            curved = insert_call(node, aten.add.Tensor, above, below)
            node.replace_all_uses_with(insert_call(node, aten.add.Tensor, curved, line))
            sites += 1
        return sites

    def _match(
        self, node: fx.Node, x: fx.Node, graph_module: fx.GraphModule
    ) -> _Coefficients | None:
        """The coefficients, if the two branches are those of xIELU."""
        above, below = _terms(node.args[1], x), _terms(node.args[2], x)
        if above is None or below is None:
            self.skip(node, "its branches are not sums of two products with one coefficient each")
            return None
        p, line = above.get("square"), above.get("x")
        n, same = below.get("other"), below.get("x")
        if p is None or n is None or line is None or same is None:
            self.skip(node, "its branches are not a square and an exponential, each with a line")
            return None
        if not _equal(line.factor, same.factor):
            self.skip(node, "the lines in its two branches differ")
            return None
        cut = _exponential(n.rest, x)
        eps = float("nan") if cut is None else _number(graph_module, cut)
        if not -_EPS <= eps <= 0:
            self.skip(node, "below zero it is not expm1(min(x, eps)) - x with a tiny eps")
            return None
        return _Coefficients(p.factor, n.factor, line.factor)


class _Coefficients(NamedTuple):
    """Factors of max(x, 0) x, of ELU(x) - x, and of x: nodes that are not shared, or numbers."""

    p: Any
    n: Any
    b: Any


class _Term(NamedTuple):
    """A product of one coefficient and `rest`, which is None for a power of x."""

    factor: Any
    rest: Any = None


def _above_zero(node: Any) -> Any:
    """The x of x > 0 or of 0 < x; None for another condition."""
    if calls(node, aten.gt.Scalar) and node.args[1] == 0 and is_shared(node.args[0]):
        return node.args[0]
    return None


def _terms(node: Any, x: fx.Node) -> dict[str, _Term] | None:
    """The two terms of a sum by kind: "square" and "x" for powers of x, "other" for the rest."""
    if not calls(node, aten.add.Tensor) or node.kwargs:
        return None
    found: dict[str, _Term] = {}
    for summand in node.args:
        factors = list(_factors(summand))
        coefficients = [factor for factor in factors if not is_shared(factor)]
        secret = [factor for factor in factors if is_shared(factor)]
        if len(coefficients) != 1:
            return None
        if all(factor is x for factor in secret) and len(secret) in (1, 2):
            found["x" if len(secret) == 1 else "square"] = _Term(coefficients[0])
        elif len(secret) == 1:
            found["other"] = _Term(coefficients[0], secret[0])
    return found if len(found) == 2 else None


def _factors(node: Any) -> list[Any]:
    """The factors of a product, squares taken apart."""
    if calls(node, aten.mul.Tensor) and is_shared(node):
        return [factor for operand in node.args for factor in _factors(operand)]
    if calls(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return [node.args[0], node.args[0]]
    return [node]


def _equal(a: Any, b: Any) -> bool:
    """Whether two coefficients are the same node, constant or number."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.op == b.op == "get_attr":
        return a.target == b.target
    return a is b or (not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and a == b)


def _exponential(node: Any, x: fx.Node) -> Any:
    """The eps of expm1(min(x, eps)) - x; None for anything else."""
    if not calls(node, aten.sub.Tensor) or node.args[1] is not x or node.kwargs:
        return None
    curved: Any = node.args[0]
    if not calls(curved, aten.expm1.default):
        return None
    cut: Any = curved.args[0]
    if not calls(cut, aten.min.other, aten.minimum.default, aten.clamp_max.default):
        return None
    return cut.args[1] if cut.args[0] is x else None


def _number(graph_module: fx.GraphModule, value: Any) -> float:
    """A literal, or a constant of one element; NaN for anything else."""
    held = constant(graph_module, value)
    if isinstance(held, torch.Tensor):
        return float(held) if held.numel() == 1 else float("nan")
    return float(value) if isinstance(value, (int, float)) else float("nan")
