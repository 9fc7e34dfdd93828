"""Adds trained heads to a captured step, which guess the tokens after the next one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.ir import add_constant, aten, calls, constant, rank
from mergec.compiler.graph.shapes import evaluate, fake_mode, insert_call
from mergec.compiler.graph.visibility import annotate_visibility
from mergec.runtime.core.spec import Vis

PREFIX = "medusa."
"""How names of the heads' tensors begin."""

BLOCK, BLOCK_BIAS = f"{PREFIX}block.weight", f"{PREFIX}block.bias"


def head_name(number: int) -> str:
    """The name of the matrix of a head, counted from 1."""
    return f"{PREFIX}{number}.weight"


def bias_name(number: int) -> str:
    """The name of the bias of a head, counted from 1."""
    return f"{PREFIX}{number}.bias"


@dataclass(frozen=True)
class Heads:
    """Trained heads of one model, as in Medusa (Cai et al., ICML 2024).

    With h [E], the input of the model's own head, head k guesses the token after the next k ones:
    logits W_k (h + SiLU(B_k h + b_k)) + c_k, or W_k h + c_k without blocks.

    count: how many. tensors: by name W_k [V, E] (`head_name`); c_k [V] (`bias_name`) if the model's
    head has a bias; and, if there are blocks, all B_k together [count * E, E] (BLOCK) and all b_k
    (BLOCK_BIAS). base: `digest` of the model's own head.
    """

    count: int
    tensors: Mapping[str, torch.Tensor]
    base: str

    @property
    def blocks(self) -> bool:
        """Whether each head has a residual block."""
        return BLOCK in self.tensors


def digest(matrix: torch.Tensor) -> str:
    """SHA-256 of a model's head in float32, in hexadecimal: tells to which model heads belong."""
    held = matrix.detach().cpu().to(torch.float32).contiguous()
    return hashlib.sha256(held.numpy().tobytes()).hexdigest()


def add_heads(captured: Captured, heads: Heads) -> None:
    """Let a captured step give what the heads say beside its logits, in place.

    The first result becomes [1, (1 + count) * R, V] instead of [1, R, V]: the logits of the first
    head at the R positions where the step gives logits, those of the second, and so on; and the
    model's own last. The heads read the rows that the model's own head reads, so they run at the
    same time, and only their blocks take rounds of their own. Raises CompileError if the heads are
    those of another model, or if the logits do not come from a linear layer.
    """
    graph_module = captured.graph_module
    graph = graph_module.graph
    annotate_visibility(graph_module, captured.inputs, captured.constants)
    (output,) = [node for node in graph.nodes if node.op == "output"]
    logits, *caches = output.args[0]
    own = _linear(logits)
    _check(heads, constant(graph_module, own.args[1]))
    _select_before(own, logits)
    logits = output.args[0][0]
    mode = fake_mode(graph)

    def held(name: str) -> fx.Node | None:
        value = heads.tensors.get(name)
        if value is None:
            return None
        value = value.to(own.meta["val"].dtype)
        node = add_constant(own, captured.constants, name, value, Vis.SERVER)
        node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode else value
        return node

    x: Any = own.args[0]
    width = x.meta["val"].shape[-1]
    rows = [x] * heads.count
    # Before the model's own head, so that what it reveals stays the last that a step reveals.
    if heads.blocks:
        flat = insert_call(own, aten.linear.default, x, held(BLOCK), held(BLOCK_BIAS))
        flat = insert_call(own, aten.silu.default, flat)
        for k in range(heads.count):
            part = insert_call(own, aten.slice.Tensor, flat, -1, k * width, (k + 1) * width)
            rows[k] = insert_call(own, aten.add.Tensor, x, part)
    said = [
        insert_call(own, aten.linear.default, row, held(head_name(k)), held(bias_name(k)))
        for k, row in enumerate(rows, 1)
    ]
    with graph.inserting_before(output):
        whole = graph.call_function(aten.cat.default, ([*said, logits], 1))
    whole.meta = {key: own.meta.get(key, "") for key in ("module", "source")} | {"vis": Vis.SHARED}
    whole.meta["val"] = evaluate(whole.target, whole.args, {}, mode)
    output.args = ([whole, *caches],)
    graph.lint()
    graph_module.recompile()


def _linear(logits: fx.Node) -> fx.Node:
    """The layer that the logits come from, behind calls with one operand that varies."""
    node: Any = logits
    while not calls(node, aten.linear.default):
        operands = [n for n in node.all_input_nodes if n.meta["vis"] is Vis.SHARED]
        if node.op != "call_function" or len(operands) != 1:
            raise CompileError(
                "heads do not fit this model",
                {node: "its logits do not come from one linear layer"},
            )
        (node,) = operands
    return node


def _check(heads: Heads, matrix: torch.Tensor | None) -> None:
    """Raise CompileError unless the heads belong beside this matrix, and are whole."""
    if matrix is None:
        raise CompileError("the matrix of the model's head is computed; heads do not fit it")
    if digest(matrix) != heads.base:
        raise CompileError(
            "these heads were trained beside another model; give the folder that `mergec adapt "
            "--medusa` wrote as it is"
        )
    rows, width = matrix.shape
    shapes: dict[str, tuple[int, ...]] = {}
    for k in range(1, heads.count + 1):
        shapes |= {head_name(k): (rows, width), bias_name(k): (rows,)}
    shapes |= {BLOCK: (heads.count * width, width), BLOCK_BIAS: (heads.count * width,)}
    needed = {head_name(k) for k in range(1, heads.count + 1)} | (
        {BLOCK_BIAS} if heads.blocks else set()
    )
    wrong = sorted(needed - heads.tensors.keys())
    wrong += [
        name for name, value in heads.tensors.items() if shapes.get(name) != tuple(value.shape)
    ]
    if wrong:
        raise CompileError(
            f"the tensor {wrong[0]} of the heads is missing or has another shape than "
            "the model needs; adapt the model again"
        )


def _select_before(own: fx.Node, logits: fx.Node) -> None:
    """Select the positions that get logits before the head, where the model does so behind it."""
    following: list[fx.Node] = []
    node = logits
    while node is not own:
        following.insert(0, node)
        (node,) = [n for n in node.all_input_nodes if n.meta["vis"] is Vis.SHARED]
    mode = fake_mode(own.graph)
    changed = False
    for node in following:
        source: Any = node.args[0]
        if calls(node, aten.slice.Tensor) and _positions(node, source):
            x: Any = own.args[0]
            own.replace_input_with(x, insert_call(own, node.target, x, *node.args[1:]))
            node.replace_all_uses_with(source)
            own.graph.erase_node(node)
            own.meta["val"] = evaluate(own.target, own.args, own.kwargs, mode)
            changed = True
        elif changed:
            node.meta["val"] = evaluate(node.target, node.args, node.kwargs, mode)


def _positions(node: fx.Node, source: fx.Node) -> bool:
    """Whether a slice selects along the dimension of positions, the second of three."""
    return rank(source) == 3 and node.args[1] in (1, -2)
