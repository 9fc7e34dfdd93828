"""Element-wise difference of two tensors."""

from __future__ import annotations

import torch

from runtime.op import Op


class Sub(Op):
    """Element-wise difference of two tensors."""

    name = "sub"
    schema = "(Tensor a, Tensor b) -> Tensor"

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b
