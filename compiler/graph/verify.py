"""Checks that a graph consists only of nodes that can be lowered."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from mergec.compiler.errors import CompileError
from mergec.compiler.graph.ir import is_public
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import (
    MOVE_NAMES,
    TABLE,
    secret_parameters,
    target_name,
)

_BUILT_FROM = {
    "rsub": "sub",
    "neg": "scale",
    "div": "reciprocal",
    "pow": "square",
    "mean": "sum",
    "mm": "matmul",
    "bmm": "matmul",
    "addmm": "linear",
    "_softmax": "softmax",
    "topk": "top_k",
}
"""Functions of torch that passes express with a dialect op of another name."""


_CHOICES = {
    "aten.where.self",
    "aten.where.ScalarOther",
    "aten.where.ScalarSelf",
    "aten.where.Scalar",
    "aten.masked_fill.Scalar",
    "aten.masked_fill.Tensor",
}
"""Functions that choose between two values by a condition."""


def verify_dialect(graph_module: fx.GraphModule) -> None:
    """Raise CompileError, which names every node that no party could run."""
    bad = unlowerable(graph_module)
    if bad:
        many = f"{len(bad)} ops" if len(bad) > 1 else "an op"
        raise CompileError(
            f"the model has {many} that cannot be lowered",
            {node: f"{reason}{_way(node)}" for node, reason in bad.items()},
        )


def unlowerable(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """Every node that no party could run, and why.

    A shared value must come from an op of the dialect or from one that moves data. A value that is
    public, or held by one party, may come from any function of `runtime.core.structural`.
    """
    bad: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        name = target_name(node.target)
        if node.op != "call_function":
            bad[node] = f"a {node.op} node cannot be compiled; export the model with torch.export"
        elif name.startswith("mpc."):
            if name[4:] not in REGISTRY:
                bad[node] = f"{name} is not an op of the dialect"
        elif node.meta.get("vis") is Vis.SHARED and name not in MOVE_NAMES:
            bad[node] = f"{name} has no protocol on secret values"
        elif name not in TABLE:
            bad[node] = f"{name} is not a function that a program may call"
        elif chooser := _chooser(node, name):
            bad[node] = (
                f"{name} looks up or cuts by the value of %{chooser.name}, which is secret; look "
                "rows up by torch.nn.functional.embedding, in a table of two dimensions"
            )
        if node in bad and (maker := node.meta.get("pass")):
            bad[node] += f"; made by the pass {maker}"
    return bad


def _chooser(node: fx.Node, name: str) -> fx.Node | None:
    """A secret operand on whose value the result's shape depends, or whether the call fails.

    Every role refuses such an instruction (`runtime.program.validate`): it would tell the secret.
    """
    allowed = secret_parameters(name)
    for key, argument in [*enumerate(node.args), *node.kwargs.items()]:
        found: list[fx.Node] = []
        fx.map_arg(argument, found.append)
        for operand in found:
            if key not in allowed and operand.meta.get("vis", Vis.PUBLIC) is not Vis.PUBLIC:
                return operand
    return None


def _way(node: fx.Node) -> str:
    """How a function on secrets can probably be added: by a pass, or by an op with its protocol.

    A pass suffices if the dialect has an op for it, or for each function into which torch
    decomposes it. Everything else needs a protocol.
    """
    if node.meta.get("vis") is not Vis.SHARED or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._schema.name.partition("::")[2]
    if node.target.namespace == "mpc":
        return ""
    if op := _op_for(name):
        return (
            f"; the dialect has mpc.{op}: write a pass that makes it, or enable the one that does"
        )
    parts = _decomposed(node)
    if parts & _CHOICES and _chooses_publicly(node):
        return (
            "; its condition is public: write a pass that multiplies by it, with mpc.mul and "
            "mpc.add"
        )
    if parts and all(part in MOVE_NAMES or _op_for(part.split(".")[1]) for part in parts):
        ops = sorted({f"mpc.{op}" for part in parts if (op := _op_for(part.split(".")[1]))})
        return f"; write a pass that expresses it with {', '.join(ops) or 'ops that move data'}"
    return (
        f"; it needs an op with a protocol of its own: add runtime/ops/{name.strip('_')}.py, and a "
        "pass that makes it"
    )


def _chooses_publicly(node: fx.Node) -> bool:
    """Whether the condition of a choice, its only boolean operand, is public."""
    kinds = [operand for operand in node.all_input_nodes if _is_boolean(operand)]
    return bool(kinds) and all(is_public(operand) for operand in kinds)


def _is_boolean(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _op_for(name: str) -> str:
    """The dialect op that a function of torch becomes, or is expressed with."""
    name = _BUILT_FROM.get(name, name)
    return name if name in REGISTRY else ""


def _decomposed(node: fx.Node) -> set[str]:
    """The functions that torch decomposes a call into; itself, if it does not."""

    def example(operand: fx.Node) -> Any:
        value = operand.meta["val"]
        if not isinstance(value, torch.Tensor):
            return int(value)
        shape = [size if isinstance(size, int) else size.node.hint for size in value.shape]
        return torch.zeros(shape, dtype=value.dtype)

    given: list[fx.Node] = node.all_input_nodes

    def call(*operands: Any) -> Any:
        known: dict[fx.Node, Any] = dict(zip(given, operands, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with _silent():
        try:
            values = [example(operand) for operand in given]
            traced = make_fx(call, decomposition_table=_decompositions())(*values)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            # Torch decomposes only what it can trace, and sizes may depend on data.
            return {target_name(node.target)}
    return {target_name(n.target) for n in traced.graph.nodes if n.op == "call_function"}


@cache
def _decompositions() -> dict[Any, Any]:
    """All of torch's, which it looks for in a few tenths of a second each time it is asked."""
    table: Any = core_aten_decompositions()
    return dict(table.items())


@contextmanager
def _silent() -> Iterator[None]:
    """torch logs the errors that it raises while it traces."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
