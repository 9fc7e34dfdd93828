"""Where a constant factor of a value can go: into the weights of the layer that makes it."""

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
    """A factor near one, and a power of two, whose product is `factor`.

    A power of two only moves the binary point of shares, so it may stay where it is; the weights
    take the rest, which does not change their size much.
    """
    power = 2.0 ** round(math.log2(abs(factor)))
    return factor / power, power


def scales_above(operand: Any) -> list[fx.Node]:
    """The `mpc.scale` nodes between a value and the layer it comes from."""
    found = []
    while _lets_pass(operand):
        if calls(operand, target("scale")):
            found.append(operand)
        operand = operand.args[0]
    return found


@dataclass
class Absorber:
    """A layer whose weights can take a factor of some of its features, the last dimension.

    features: numbers of those that the factor is for. `find` looks for it.
    """

    layer: fx.Node
    features: torch.Tensor

    @staticmethod
    def find(graph_module: fx.GraphModule, consumer: fx.Node, operand: Any) -> Absorber | str:
        """The layer that makes an operand, if nobody but its consumer gets the same features.

        Movement of data, rotary embedding and numeric factors may stand between. One layer may make
        queries, keys and values: what goes where is found by moving the features' numbers. Gives
        the reason where there is none.
        """
        layer = operand
        while _lets_pass(layer):
            layer = layer.args[0]
        weights = _weights(layer)
        if not weights:
            return f"{layer} has no weights that could take the factor"
        for weight in weights:
            if not computable(graph_module, weight):
                return f"a weight of {layer} is no constant of 32 bits or more"
            if any(user is not layer for user in uses(graph_module, weight)):
                return f"a weight of {layer} is used elsewhere too, and would be kept twice"
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
            return f"{layer} has other users, which take no factor"
        return Absorber(layer, features)

    def multiply(
        self, graph_module: fx.GraphModule, factor: float, known: MutableMapping[str, Vis]
    ) -> None:
        """Replace the weights by scaled ones; they are told to `known`, see `insert_folded`."""
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
    """Whether a factor of the result may as well be one of the first operand."""
    if calls(node, target("scale")):
        return len(node.users) == 1
    if is_move(node):
        return not any(_computed(operand) for operand in node.all_input_nodes[1:])
    return calls(node, target("rotary"))


def _computed(operand: fx.Node) -> bool:
    """Whether a further operand of a movement is a tensor that is known only at run time."""
    return operand.op != "get_attr" and isinstance(operand.meta.get("val"), torch.Tensor)


def _arrivals(
    node: fx.Node, consumer: fx.Node, numbers: torch.Tensor
) -> Iterator[tuple[fx.Node, fx.Node, torch.Tensor]]:
    """The consumer, and each user that is no movement; what it takes; which features these are."""
    for user in node.users:
        if user is consumer or not _lets_pass(user):
            yield user, node, numbers
        else:
            there = moved(user, numbers) if is_move(user) else numbers
            yield from _arrivals(user, consumer, there)


def _weights(layer: fx.Node) -> list[Any]:
    """The constants that a layer's result is proportional to, all together."""
    found: tuple[Any, ...] = ()
    if calls(layer, target("linear"), target("layer_norm")):
        found = layer.args[1:3]
    elif calls(layer, target("embedding"), target("rms_norm")):
        found = layer.args[1:2]
    weightless = not found or found[0] is None
    return [] if weightless else [weight for weight in found if weight is not None]
