"""Recognize activation functions by their values, however they are written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target

_DIRECT = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.mish.default: "mish",
}
_KNOWN: tuple[tuple[Callable[[torch.Tensor], torch.Tensor], str, tuple[bool, ...]], ...] = (
    (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "gelu", (True,)),
    (torch.nn.functional.gelu, "gelu", (False,)),
    (torch.nn.functional.silu, "silu", ()),
    (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu", ()),
)
_SCALAR = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
    aten.pow.Tensor_Scalar, aten.tanh.default, aten.erf.default, aten.sigmoid.default,
)  # fmt: skip
_CURVED = (aten.tanh.default, aten.erf.default, aten.sigmoid.default)
_TOLERANCE = 1e-7
"""Tolerance of the comparison: models write their constants with 8 digits or more."""


class FuseActivations(Pass):
    """Fuses the scalar arithmetic around a tanh, erf or sigmoid into one activation op.

    A region with one secret input and one output is evaluated on a grid of inputs. If its values
    are those of GELU (either form), SiLU or quick GELU, it becomes that op.

    Before:
        %x = input : shared 2x4
        %1 = aten.mul.Tensor(%x, 0.5)
        %2 = aten.pow.Tensor_Scalar(%x, 3.0)
        %3 = aten.mul.Tensor(%2, 0.044715)
        %4 = aten.add.Tensor(%x, %3)
        %5 = aten.mul.Tensor(%4, 0.7978845608028654)
        %6 = aten.tanh.default(%5)
        %7 = aten.add.Tensor(%6, 1.0)
        %8 = aten.mul.Tensor(%1, %7)
    After:
        %8 = mpc.gelu(%x, True)
    """

    stage = "fuse"
    after = ("fuse_attention",)  # its softcap is a tanh that belongs to the attention

    def run(self, graph_module: fx.GraphModule) -> int:
        sites = 0
        for node in list(graph_module.graph.nodes):
            if calls(node, *_CURVED) and is_shared(node) and node.users:
                sites += self._by_value(node)
        # Otherwise parts of a fused region would be matched as further activations.
        graph_module.graph.eliminate_dead_code()
        for node in list(graph_module.graph.nodes):
            if not is_shared(node) or node.op != "call_function":
                continue
            if calls(node, aten.gelu.default):
                replace(
                    node, target("gelu"), (node.args[0], node.kwargs.get("approximate") == "tanh")
                )
                sites += 1
            elif calls(node, aten.elu.default):
                if any(value != 1 for value in (*node.args[1:], *node.kwargs.values())):
                    self.skip(node, "its alpha or one of its scales is not 1")
                    continue
                replace(node, target("elu"), (node.args[0],))
                sites += 1
            elif node.target in _DIRECT and node.users:
                replace(node, target(_DIRECT[node.target]), (node.args[0],))
                sites += 1
        return sites

    def _by_value(self, curved: fx.Node) -> int:
        region: set[fx.Node] = set()
        sources: set[fx.Node] = set()
        _collect(curved, region, sources)
        for source in sorted(sources, key=lambda node: node.name):
            output = curved
            while len(output.users) == 1:
                (user,) = output.users
                if not calls(user, *_SCALAR):
                    break
                output = user
                found = _match(output, source)
                if found is not None:
                    name, options = found
                    replace(output, target(name), (source, *options))
                    return 1
        return 0


def _collect(node: fx.Node, region: set[fx.Node], sources: set[fx.Node]) -> None:
    """All ancestors reachable through scalar arithmetic; each is a candidate for the input."""
    for operand in node.all_input_nodes:
        sources.add(operand)
        if calls(operand, *_SCALAR) and operand not in region:
            region.add(operand)
            _collect(operand, region, sources)


def _match(output: fx.Node, source: fx.Node) -> tuple[str, tuple[bool, ...]] | None:
    grid = torch.linspace(-6, 6, 97, dtype=torch.float64)
    values = _evaluate(output, source, grid, {})
    if values is None:
        return None
    for function, name, options in _KNOWN:
        if bool((values - function(grid)).abs().max() < _TOLERANCE):
            return name, options
    return None


def _evaluate(
    node: fx.Node, source: fx.Node, grid: torch.Tensor, known: dict[fx.Node, torch.Tensor | None]
) -> torch.Tensor | None:
    if node is source:
        return grid
    if node in known:
        return known[node]
    known[node] = None
    if calls(node, *_SCALAR) and not node.kwargs:
        arguments = []
        for arg in node.args:
            value = _evaluate(arg, source, grid, known) if isinstance(arg, fx.Node) else arg
            if value is None:
                return None
            arguments.append(value)
        known[node] = node.target(*arguments)  # type: ignore[operator]
    return known[node]
