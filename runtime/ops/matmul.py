"""Batched matrix product of two tensors."""

from __future__ import annotations

import torch

from runtime.op import Op


class Matmul(Op):
    """Batched matrix product of two tensors."""

    name = "matmul"
    schema = "(Tensor a, Tensor b) -> Tensor"

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.matmul(a, b)
