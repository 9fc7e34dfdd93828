"""Logistic function."""

from __future__ import annotations

import torch

from runtime.op import Op


class Sigmoid(Op):
    """Logistic function."""

    name = "sigmoid"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x)
