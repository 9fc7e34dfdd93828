"""Moves a constant factor of a value into the weights of the layer that computes the value."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import calls
from mergec.compiler.graph.moves import is_move, known_size, moved
from mergec.compiler.graph.weights import computable, insert_folded, uses, wide
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis


def split_factor(factor: float) -> tuple[float, float]:
    """Split `factor` into a factor near one and a power of two.

    A power of two only moves the binary point of shares, so it may stay where it is. The weights
    absorb the rest, which changes their magnitude little.
    """
    power = 2.0 ** round(math.log2(abs(factor)))
    return factor / power, power


def scales_above(operand: Any) -> list[fx.Node]:
    """The `mpc.scale` nodes between a value and the layer that computes it."""
    found = []
    while _lets_pass(operand):
        if calls(operand, target("scale")):
            found.append(operand)
        operand = operand.args[0]
    return found


@dataclass
class Absorber:
    """A layer whose weights can absorb a factor of some of its features (its last dimension).

    features: indices of the features that the factor applies to. Created by `find`.
    """

    layer: fx.Node
    features: torch.Tensor

    @staticmethod
    def find(graph_module: fx.GraphModule, consumer: fx.Node, operand: Any) -> Absorber | str:
        """The layer that computes an operand, if only its consumer receives the same features.

        Data movement, rotary embedding and numeric factors may lie in between. One layer may
        compute queries, keys and values; moving the features' indices shows which go where. Returns
        the reason as text if no layer qualifies.
        """
        layer = operand
        while _lets_pass(layer):
            layer = layer.args[0]
        weights = _weights(layer)
        if not weights:
            return f"%{layer} has no weights that could absorb the factor"
        for weight in weights:
            if not computable(graph_module, weight):
                return f"a weight of %{layer} is not a constant of 32 bits or more"
            if any(user is not layer for user in uses(graph_module, weight)):
                return f"a weight of %{layer} is also used elsewhere, so it would be stored twice"
        value = layer.meta["val"]
        numbers = torch.arange(value.shape[-1]).expand([known_size(size) for size in value.shape])
        mine: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for user, source, there in _arrivals(layer, consumer, numbers):
            places = [arg for arg in user.args if arg is source]
            wanted = user is consumer and source is operand and len(places) == 1
            (mine if wanted else others).append(there.flatten())
        features = torch.cat(mine).unique() if mine else numbers
        if others and bool(torch.isin(features, torch.cat(others)).any()):
            return f"%{layer} has other users, which must not get the factor"
        return Absorber(layer, features)

    def multiply(
        self, graph_module: fx.GraphModule, factor: float, known: MutableMapping[str, Vis]
    ) -> None:
        """Replace the weights by scaled ones, which are added to `known`; see `insert_folded`."""
        layer, offset = self.layer, 0.0
        if calls(layer, target("rms_norm")) and len(layer.args) > 3:
            offset = float(layer.args[3])  # type: ignore[arg-type]
            layer.update_arg(3, 0.0)
        for weight in _weights(layer):
            value = wide(graph_module, weight) + offset
            factors = torch.ones(layer.meta["val"].shape[-1], dtype=torch.float64)
            factors[self.features] = factor
            turned = calls(layer, target("linear")) and value.dim() == 2
            scaled = value * (factors[:, None] if turned else factors)
            layer.replace_input_with(
                weight, insert_folded(graph_module, layer, weight, scaled, known)
            )


def _lets_pass(node: Any) -> bool:
    """Whether a factor of the result can equally be applied to the first operand."""
    if calls(node, target("scale")):
        return len(node.users) == 1
    if is_move(node):
        return not any(_computed(operand) for operand in node.all_input_nodes[1:])
    return calls(node, target("rotary"))


def _computed(operand: fx.Node) -> bool:
    """Whether another operand of a movement is a tensor that is known only at run time."""
    return operand.op != "get_attr" and isinstance(operand.meta.get("val"), torch.Tensor)


def _arrivals(
    node: fx.Node, consumer: fx.Node, numbers: torch.Tensor
) -> Iterator[tuple[fx.Node, fx.Node, torch.Tensor]]:
    """The consumer and each user that is not a movement, with its operand and its features."""
    for user in node.users:
        if user is consumer or not _lets_pass(user):
            yield user, node, numbers
        else:
            there = moved(user, numbers) if is_move(user) else numbers
            yield from _arrivals(user, consumer, there)


def _weights(layer: fx.Node) -> list[Any]:
    """The constants to which a layer's result is jointly proportional."""
    found: tuple[Any, ...] = ()
    if calls(layer, target("linear"), target("layer_norm")):
        found = layer.args[1:3]
    elif calls(layer, target("embedding"), target("rms_norm")):
        found = layer.args[1:2]
    weightless = not found or found[0] is None
    return [] if weightless else [weight for weight in found if weight is not None]
