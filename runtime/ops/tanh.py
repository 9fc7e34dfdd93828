"""Hyperbolic tangent."""

from __future__ import annotations

import torch

from runtime.op import Op


class Tanh(Op):
    """Hyperbolic tangent."""

    name = "tanh"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)
