"""Exponential function of non-positive arguments and of small positive ones."""

from __future__ import annotations

import torch

from runtime.op import Op


class Exp(Op):
    """Exponential function of non-positive arguments and of small positive ones."""

    name = "exp"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)
