"""1 / x for positive x."""

from __future__ import annotations

import torch

from runtime.op import Op


class Reciprocal(Op):
    """1 / x for positive x."""

    name = "reciprocal"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.reciprocal(x)
