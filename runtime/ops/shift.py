"""Sum of a tensor and a public number."""

from __future__ import annotations

import torch

from runtime.op import Op


class Shift(Op):
    """Sum of a tensor and a public number."""

    name = "shift"
    schema = "(Tensor x, float amount) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor, amount: float) -> torch.Tensor:
        return x + amount
