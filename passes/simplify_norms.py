"""Put constant statistics in the place of a norm's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compiler.ir import add_constant, aten, calls, constant, insert, replace
from compiler.legalize import bind
from compiler.ranges import replay
from passes.base import Pass
from runtime.op import REGISTRY, target
from runtime.spec import Vis


class SimplifyNorms(Pass):
    """A norm becomes gain * x + shift: no square, no inverse root, no opening to both.

    Lossy. THE-X (Chen et al., Findings of ACL 2022, section 3) drops mean and deviation of the row
    and trains gain and shift anew. Without training, the two are taken from calibration: with m the
    mean of all rows and s the median of their deviations, gain = weight / s and
    shift = bias - m * gain. That is exact for rows of this mean and deviation. Both tensors follow
    from the weights, so the server holds them; a gain is kept to 16 fractional bits, so that
    deviations above 2**8 cost precision.

    Before:
        %1 = mpc.layer_norm(%x, %weight, %bias, 1e-05)
    After:
        %1 = aten.mul.Tensor(%x, %gain)
        %2 = aten.add.Tensor(%1, %shift)
    """

    stage = "approximate"
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        norms = [node for node in graph_module.graph.nodes if _is_norm(node)]
        if not norms:
            return 0
        found = observe_norms(graph_module, norms, self.info.inputs, self.info.calibration)
        for node in norms:
            gain, shift = affine(graph_module, node, *found[node])
            place = node.meta.get("module") or node.name
            held = add_constant(node, self.info.constants, f"{place}.gain", gain, Vis.SERVER)
            arguments = (node.args[0], held)
            if shift is None:
                replace(node, aten.mul.Tensor, arguments)
                continue
            scaled = insert(node, aten.mul.Tensor, arguments, node.meta["val"], Vis.SHARED)
            held = add_constant(node, self.info.constants, f"{place}.shift", shift, Vis.SERVER)
            replace(node, aten.add.Tensor, (scaled, held))
        return len(norms)


def _is_norm(node: fx.Node) -> bool:
    return calls(node, target("rms_norm"), target("layer_norm"))


def observe_norms(
    graph_module: fx.GraphModule, norms: list[fx.Node], inputs: Any, sequences: Any
) -> dict[fx.Node, tuple[float, float]]:
    """The mean of the rows' means, and the median of their deviations, by norm."""
    rows: dict[fx.Node, list[torch.Tensor]] = {node: [] for node in norms}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n in rows:
                operand: Any = n.args[0]
                value = self.env[operand].to(torch.float64)
                rows[n].append(value.reshape(-1, value.shape[-1]))
            return super().run_node(n)

    replay(Observer(graph_module), inputs, sequences)
    return {node: _statistics(node, torch.cat(found)) for node, found in rows.items()}


def _statistics(node: fx.Node, rows: torch.Tensor) -> tuple[float, float]:
    eps = bind(_op(node), node)["eps"]
    means = rows.mean(-1, keepdim=True)
    if calls(node, target("rms_norm")):
        means = torch.zeros_like(means)
    deviations = ((rows - means).square().mean(-1) + eps).sqrt()
    return float(means.mean()), float(deviations.median())


def affine(
    graph_module: fx.GraphModule, node: fx.Node, mean: float, deviation: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gain and shift of a norm with these statistics; an RMSNorm has no shift."""
    arguments = bind(_op(node), node)
    like = node.meta["val"]
    weight = constant(graph_module, arguments["weight"])
    if weight is None:
        weight = torch.ones(like.shape[-1], dtype=like.dtype)
    gain = (weight.to(torch.float64) + arguments.get("offset", 0.0)) / deviation
    if calls(node, target("rms_norm")):
        return gain.to(weight.dtype), None
    shift = -mean * gain
    bias = constant(graph_module, arguments["bias"])
    if bias is not None:
        shift = shift + bias.to(torch.float64)
    return gain.to(weight.dtype), shift.to(weight.dtype)


def _op(node: fx.Node) -> Any:
    return REGISTRY["rms_norm" if calls(node, target("rms_norm")) else "layer_norm"]
