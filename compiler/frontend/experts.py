"""Mixtures of experts run all experts, because which ones a router chooses is secret."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


def is_experts(path: str, module: nn.Module) -> bool:
    """Whether a module, found under a path of the model, holds the experts that are chosen from."""
    return "Experts" in type(module).__name__ or path.rpartition(".")[2] == "experts"


def can_run_all(module: Any) -> bool:
    """Whether experts are stored as `AllExperts` expects them.

    It reads what transformers' `use_experts_implementation` says about the module that it wraps,
    so that other implementations of its forward pass can be chosen.
    """
    said = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    return all(hasattr(module, name) for name in said) and not module.has_post_expert_norm


class AllExperts(nn.Module):
    """The experts of a layer, as one MLP of the width of all of them.

    Each expert's part of the inner values is multiplied by the expert's gate, which is zero for
    those that were not chosen. So the product with all `down` matrices, side by side, is the sum of
    the chosen experts' results times their weights. Parameters have the names of the given ones,
    but are matrices: one product each, under one mask.
    """

    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.count = int(experts.down_proj.shape[0])
        self.up_name = _up_name(experts)
        made = {name: join(getattr(experts, name)) for name, join in _joins(experts).items()}
        if experts.has_bias:
            made["down_proj_bias"] = experts.down_proj_bias
        for name, value in made.items():
            self.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))
        self.activate = experts._apply_gate if experts.has_gate else experts.act_fn

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum over each row's chosen experts.

        hidden: [T, H]. chosen: numbers of k experts for each row, [T, k]. weights: theirs, [T, k].
        """
        rows = hidden.shape[0]
        gates = weights.new_zeros(rows, self.count).scatter(-1, chosen, weights).to(hidden.dtype)
        bias = self._parameters.get(f"{self.up_name}_bias")
        inner = self.activate(linear(hidden, getattr(self, self.up_name), bias))
        inner = inner.reshape(rows, self.count, -1) * gates.unsqueeze(-1)
        result = linear(inner.reshape(rows, -1), self.down_proj)
        return result if bias is None else result + gates @ self.down_proj_bias


Join = Callable[[torch.Tensor], torch.Tensor]
"""Makes a parameter of `AllExperts` of that of the same name of the given experts."""


def joins_of(model: nn.Module) -> dict[str, Join]:
    """For each parameter of a model that `all_experts` joins, by its name, how it does so."""
    return {
        f"{path}.{name}": join
        for path, module in model.named_modules()
        if can_run_all(module)
        for name, join in _joins(module).items()
    }


def _joins(experts: Any) -> dict[str, Join]:
    name, turned = _up_name(experts), bool(experts.is_transposed)
    parts = 2 if experts.has_gate and experts.is_concatenated else 1
    found: dict[str, Join] = {
        name: partial(_joined_rows, parts=parts, turned=turned),
        "down_proj": partial(_joined_columns, turned=turned),
    }
    if experts.has_bias:
        found[f"{name}_bias"] = partial(_joined_rows, parts=parts)
    return found


def _up_name(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _joined_rows(weight: torch.Tensor, parts: int, turned: bool = False) -> torch.Tensor:
    """Rows of all experts, [E, rows, …] to [E * rows, …]: first all experts' gates, then all ups.

    parts: how many of these are stored one behind the other; 1 if there is one, or if rows
    alternate. turned: whether each expert's matrix is stored transposed.
    """
    weight = weight.mT if turned else weight
    return weight.unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 2)


def _joined_columns(weight: torch.Tensor, turned: bool) -> torch.Tensor:
    """Columns of all experts side by side, [E, rows, columns] to [rows, E * columns]; see there."""
    weight = weight.mT if turned else weight
    return weight.transpose(0, 1).flatten(1)


@contextlib.contextmanager
def all_experts(model: nn.Module) -> Iterator[None]:
    """Let every expert of a mixture run, if `can_run_all`; the model is restored afterwards."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if can_run_all(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, AllExperts(child))
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)
