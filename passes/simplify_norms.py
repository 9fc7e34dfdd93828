"""Replace the statistics of norms by constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import add_constant, aten, bind, calls, constant, insert, replace
from mergec.compiler.graph.ranges import fed, prompt
from mergec.compiler.graph.rewriting import GraphInfo, Pass
from mergec.runtime.core.op import REGISTRY, target
from mergec.runtime.core.spec import Vis

_RESENT = 2
"""Steps per sequence that start from a hidden state, when constant norms are estimated."""


class SimplifyNorms(Pass):
    """Replaces a norm by gain * x + shift: no square, no inverse root, no opening to both parties.

    Lossy. THE-X (Chen et al., Findings of ACL 2022, section 3) drops the mean and deviation of the
    row and retrains gain and shift, as `mergec adapt` does. Of a model that was not adapted they
    come from calibration. Let m be the mean of all rows, m_i and s_i the mean and deviation of row
    i, and s = sum(s_i**2 + (m_i - m)**2) / sum(s_i). Then gain = weight / s and shift = bias - m *
    gain. Of all maps g * x + c this one is nearest to the norm in least squares. It is exact if all
    rows have the same mean and deviation. None of N rows becomes longer than (1 + sqrt(N)) / 2
    times what the norm would make it. With the median deviation instead of s, a rare row of 1000
    times the usual size, as for SmolLM2's first token, would become 1000 times too long; a gated
    MLP squares that, and after a few layers it is infinite. The price: if there is such a row, the
    others nearly vanish. Each norm is estimated with the norms before it, and everything else that
    is approximated, already replaced. Both tensors follow from the weights, so the server holds
    them. A gain has 16 fractional bits, so deviations above 2**8 cost precision.

    Before:
        %ids = input : client int64 1xnew
        %table = constant : server 97x8
        %weight = constant : server 8
        %bias = constant : server 8
        %x = mpc.embedding(%ids, %table)
        %norm = mpc.layer_norm(%x, %weight, %bias, 1e-05)
    After:
        %norm.gain = constant : server 8
        %norm.shift = constant : server 8
        %x = mpc.embedding(%ids, %table)
        %mul = aten.mul.Tensor(%x, %norm.gain)
        %norm = aten.add.Tensor(%mul, %norm.shift)
    """

    stage = "approximate"
    # The statistics must be those of the approximated model.
    after = (
        "fix_attention",
        "quadratic_gelu",
        "quadratic_silu",
        "relu_activations",
        "softmax_2quad",
        "softmax_2relu",
    )
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        norms = [node for node in graph_module.graph.nodes if _is_norm(node)]
        if not norms:
            return 0
        found = constant_norms(self.info, graph_module, norms)
        for node in norms:
            put_affine(self.info, node, *found[node])
        return len(norms)


Affine = tuple[torch.Tensor, torch.Tensor | None]
"""The gain of a constant norm, and its shift, which an RMSNorm has not."""


def constant_norms(
    info: GraphInfo, graph_module: fx.GraphModule, norms: list[fx.Node]
) -> dict[fx.Node, Affine]:
    """The gain and shift of each norm: those that training determined, or else from calibration."""
    found = {norm: value for norm in norms if (value := _trained(info, norm)) is not None}
    if len(found) < len(norms):
        observed = observe_norms(graph_module, norms, info.inputs, info.calibration)
        for norm in norms:
            found.setdefault(norm, affine(graph_module, norm, *observed[norm]))
    return found


def put_affine(
    info: GraphInfo,
    node: fx.Node,
    gain: torch.Tensor,
    shift: torch.Tensor | None,
    mul: Any = aten.mul.Tensor,
    add: Any = aten.add.Tensor,
) -> None:
    """Replace a norm by gain * x + shift, written with these two ops."""
    place = _place(node)
    held = add_constant(node, info.constants, f"{place}.gain", gain, Vis.SERVER)
    arguments = (node.args[0], held)
    if shift is None:
        replace(node, mul, arguments)
        return
    scaled = insert(node, mul, arguments, node.meta["val"], Vis.SHARED)
    held = add_constant(node, info.constants, f"{place}.shift", shift, Vis.SERVER)
    replace(node, add, (scaled, held))


def _place(node: fx.Node) -> str:
    return node.meta.get("module") or node.name


def _trained(info: GraphInfo, node: fx.Node) -> Affine | None:
    like = node.meta["val"]
    width = (int(like.shape[-1]),)
    gain = info.take(f"{_place(node)}.gain", width)
    if gain is None:
        return None
    shift = info.take(f"{_place(node)}.shift", width)
    return gain.to(like.dtype), None if shift is None else shift.to(like.dtype)


def _is_norm(node: fx.Node) -> bool:
    return calls(node, target("rms_norm"), target("layer_norm"))


def observe_norms(
    graph_module: fx.GraphModule, norms: list[fx.Node], inputs: Any, sequences: Any
) -> dict[fx.Node, tuple[float, float]]:
    """The mean and deviation for each norm, from its inputs once the norms before it are constant.

    All sequences run through the graph together, node by node, and each norm is replaced as soon as
    its operands are computed. If hidden states are resent, the steps that start from them count
    too. Their inputs depend on all norms, so everything runs twice more, with the hidden states and
    caches of the previous run.
    """
    carried = [n for n in graph_module.graph.nodes if calls(n, target("carry"))]

    def first_steps() -> list[_Run]:
        return [_Run(graph_module, inputs, prompt(graph_module, inputs, s)) for s in sequences]

    runs = first_steps()
    found = _in_step(graph_module, norms, runs)
    for _ in range(_RESENT if carried else 0):
        runs = [*first_steps(), *(run.next(*carried) for run in runs)]
        found = _in_step(graph_module, norms, runs)
    return found


class _Run(fx.Interpreter):
    """A step of one sequence, run node by node."""

    def __init__(self, module: fx.GraphModule, specs: Any, inputs: Any, resent: Any = None) -> None:
        super().__init__(module)
        self.specs, self.inputs = specs, inputs
        self.args_iter = iter(inputs)
        self.resent: dict[fx.Node, Any] = resent or {}

    def take(self, node: fx.Node) -> None:
        self.env[node] = self.resent[node] if node in self.resent else self.run_node(node)

    def next(self, entering: fx.Node, leaving: fx.Node) -> _Run:
        """The step after this one, which starts from its hidden state and caches."""
        *_, output = self.module.graph.nodes  # type: ignore[union-attr,misc]
        *source, ids, caches, _ = fed(self.specs, self.inputs)
        following = self.env[output][1 : 1 + len(caches)]
        inputs = [*source, ids[:, -1:], *following]
        resent = {entering: self.env[leaving]}
        return _Run(self.module, self.specs, inputs, resent)  # type: ignore[arg-type]


def _in_step(
    graph_module: fx.GraphModule, norms: list[fx.Node], runs: list[_Run]
) -> dict[fx.Node, tuple[float, float]]:
    found: dict[fx.Node, tuple[float, float]] = {}
    with torch.inference_mode():
        for node in graph_module.graph.nodes:
            if node not in norms:
                for run in runs:
                    run.take(node)
                continue
            rows = [run.env[node.args[0]] for run in runs]
            found[node] = _statistics(node, torch.cat([_flat(r) for r in rows]))
            gain, shift = affine(graph_module, node, *found[node])
            for run, value in zip(runs, rows, strict=True):
                run.env[node] = value * gain if shift is None else value * gain + shift
    return found


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float64).reshape(-1, value.shape[-1])


def _statistics(node: fx.Node, rows: torch.Tensor) -> tuple[float, float]:
    """Statistics that bring an affine map nearest to the norm of these rows, in least squares."""
    eps = bind(_op(node), node)["eps"]
    means = rows.mean(-1)
    if calls(node, target("rms_norm")):
        means = torch.zeros_like(means)
    squares = (rows - means[:, None]).square().mean(-1) + eps
    mean = means.mean()
    spread = (means - mean).square()
    return float(mean), float((squares + spread).sum() / squares.sqrt().sum())


def affine(graph_module: fx.GraphModule, node: fx.Node, mean: float, deviation: float) -> Affine:
    """The gain and shift of a norm with these statistics; an RMSNorm has no shift."""
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
