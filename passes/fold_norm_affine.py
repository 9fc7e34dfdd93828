"""Move the gain and the bias of a norm into the linear layers that follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import calls, replace
from mergec.compiler.graph.moves import keeps_rows
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.weights import computable, insert_folded, uses, wide
from mergec.runtime.core.op import target


class FoldNormAffine(Pass):
    """Rewrites linear(y * gain + bias, W, b) as linear(y, W * gain, b + W bias).

    Saves two rounds and 24 bytes per element of each norm. A norm with a gain truncates its rows,
    sends them to the server, and truncates the result again; without a gain, it truncates once. A
    LayerNorm's bias costs nothing in either form, and moves along.

    Every consumer must be a linear layer; only ops that move data may be in between. A matrix that
    is used elsewhere too, such as a head tied to the embedding, stays as it is: its folded copy
    would be one more matrix that is opened under a mask at the start of a session, at 8 bytes per
    element. For a head of 50,000 tokens that is hundreds of megabytes, to save 14 kB and two rounds
    per token.

    Before:
        %x = input : shared 1xnewx8
        %gain = constant : server 8
        %weight = constant : server 16x8
        %1 = mpc.rms_norm(%x, %gain, 1e-06, 1.0)
        %2 = mpc.linear(%1, %weight)
    After:
        %weight_folded = constant : server 16x8
        %1 = mpc.rms_norm(%x, None, 1e-06, 0.0)
        %2 = mpc.linear(%1, %weight_folded, None)
    """

    stage = "optimize"

    def run(self, graph_module: fx.GraphModule) -> int:
        return sum(self._fold(graph_module, node) for node in list(graph_module.graph.nodes))

    def _fold(self, graph_module: fx.GraphModule, norm: fx.Node) -> int:
        affine = _affine(norm)
        if affine is None:
            return 0
        weight, bias, offset, plain = affine
        given = [node for node in (weight, bias) if node is not None]
        if not all(computable(graph_module, node) for node in given):
            self.skip(norm, "its gain or bias is not a constant of 32 bits or more")
            return 0
        linears: list[fx.Node] = []
        reason = _collect(norm, linears) or _unfit(graph_module, linears)
        if reason:
            self.skip(norm, reason)
            return 0
        for linear in linears:
            if bias is not None:
                self._absorb_bias(graph_module, linear, wide(graph_module, bias))
            if weight is not None:
                self._absorb_gain(graph_module, linear, wide(graph_module, weight) + offset)
        replace(norm, norm.target, plain)
        return 1

    def _absorb_bias(
        self, graph_module: fx.GraphModule, linear: fx.Node, shift: torch.Tensor
    ) -> None:
        x, weight, bias = _operands(linear)
        total = wide(graph_module, weight) @ shift
        if bias is not None:
            total = total + wide(graph_module, bias)
        origin, leaf = (weight, "bias") if bias is None else (bias, "")
        made = insert_folded(graph_module, linear, origin, total, self.info.constants, leaf)
        linear.args, linear.kwargs = (x, weight, made), {}

    def _absorb_gain(
        self, graph_module: fx.GraphModule, linear: fx.Node, gain: torch.Tensor
    ) -> None:
        x, weight, bias = _operands(linear)
        matrix = wide(graph_module, weight) * gain
        made = insert_folded(graph_module, linear, weight, matrix, self.info.constants)
        linear.args, linear.kwargs = (x, made, bias), {}


def _affine(norm: fx.Node) -> tuple[Any, Any, float, tuple[Any, ...]] | None:
    """The gain, the bias, the offset of the gain, and the norm's arguments without them."""
    weight: Any
    bias: Any
    if calls(norm, target("rms_norm")):
        x, weight, eps, offset = (*norm.args, 0.0)[:4]
        return None if weight is None else (weight, None, float(offset), (x, None, eps, 0.0))  # type: ignore[arg-type]
    if calls(norm, target("layer_norm")):
        x, weight, bias, eps = norm.args[:4]
        return None if weight is bias is None else (weight, bias, 0.0, (x, None, None, eps))
    return None


def _operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    return (*linear.args, None)[:3]  # type: ignore[return-value]


def _collect(node: fx.Node, linears: list[fx.Node]) -> str:
    """Collect the linear layers that read a node's rows; returns a reason if it has other users."""
    for user in node.users:
        if calls(user, target("linear")) and user.args[0] is node:
            linears.append(user)
        elif not keeps_rows(user):
            return f"its result also goes to {user.target}, which cannot absorb the gain"
        elif reason := _collect(user, linears):
            return reason
    return ""


def _unfit(graph_module: fx.GraphModule, linears: list[fx.Node]) -> str:
    """Why a gain cannot move into these layers; None if it can."""
    for linear in linears:
        _, weight, bias = _operands(linear)
        given = [node for node in (weight, bias) if node is not None]
        if not all(computable(graph_module, node) for node in given):
            return f"the matrix of %{linear.name} is not a constant of 32 bits or more"
        if any(user is not linear for user in uses(graph_module, weight)):
            return f"the matrix of %{linear.name} is also used elsewhere and would be stored twice"
    return ""
