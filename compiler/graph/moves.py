"""The effect of data movement on rows, which are the vectors along a value's last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import aten, constant, rank
from mergec.runtime.core.structural import MOVE_NAMES, target_name


def is_move(node: Any) -> bool:
    """Whether a call only moves data of its first operand."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return target_name(node.target) in MOVE_NAMES and isinstance(node.args[0], fx.Node)


def keeps_rows(node: Any) -> bool:
    """Whether a call only moves, repeats or drops whole rows of its operand."""
    if not is_move(node):
        return False
    x: Any = node.args[0]
    dims, wanted = rank(x), node.target
    if wanted in (aten.reshape.default, aten.expand.default):
        before, after = x.meta["val"].shape[-1:], node.meta["val"].shape[-1:]
        return list(before) == list(after) and all(isinstance(size, int) for size in before)
    if wanted in (aten.slice.Tensor, aten.select.int, aten.squeeze.dim):
        dim = node.args[1] if len(node.args) > 1 else 0
        return bool(dim % dims != dims - 1)
    if wanted is aten.unsqueeze.default:
        return bool(node.args[1] % (dims + 1) != dims)
    if wanted is aten.permute.default:
        return bool(node.args[1][-1] % dims == dims - 1)
    return wanted in (aten.alias.default, aten.clone.default)


def known_size(size: Any) -> int:
    """A size as a number; for a symbolic size, its value in the captured example."""
    return int(size) if isinstance(size, int) else int(size.node.hint)


def moved(move: Any, numbers: torch.Tensor) -> torch.Tensor:
    """Apply a movement to `numbers`, at the lengths with which the graph was captured."""

    def known(node: fx.Node) -> Any:
        value = constant(move.graph.owning_module, node)
        return known_size(node.meta["val"]) if value is None else value

    args, kwargs = fx.map_arg((move.args[1:], move.kwargs), known)
    result: torch.Tensor = move.target(numbers, *args, **kwargs)
    return result
