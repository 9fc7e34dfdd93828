"""x * sigmoid(1.702 x)."""

from __future__ import annotations

import torch

from runtime.op import Op


class QuickGelu(Op):
    """x * sigmoid(1.702 x)."""

    name = "quick_gelu"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)
