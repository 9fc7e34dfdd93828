"""Element-wise sum of two tensors, or of a tensor and a public number."""

from __future__ import annotations

import torch

from runtime.op import Op


class Add(Op):
    """Element-wise sum of two tensors, or of a tensor and a public number."""

    name = "add"
    schema = "(Tensor a, Tensor b) -> Tensor"

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b
