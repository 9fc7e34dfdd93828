"""max(x, 0)."""

from __future__ import annotations

import torch

from runtime.op import Op


class Relu(Op):
    """max(x, 0)."""

    name = "relu"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)
