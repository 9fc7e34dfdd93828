"""Element-wise product of two tensors."""

from __future__ import annotations

import torch

from runtime.op import Op


class Mul(Op):
    """Element-wise product of two tensors."""

    name = "mul"
    schema = "(Tensor a, Tensor b) -> Tensor"

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b
