"""Gated unit: act(gate) * up, with act one of silu, gelu, gelu_tanh, relu."""

from __future__ import annotations

import torch

from runtime.op import Op

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


class Glu(Op):
    """Gated unit: act(gate) * up, with act one of silu, gelu, gelu_tanh, relu."""

    name = "glu"
    schema = "(Tensor gate, Tensor up, str act) -> Tensor"

    @staticmethod
    def reference(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
        return ACTIVATIONS[act](gate) * up
