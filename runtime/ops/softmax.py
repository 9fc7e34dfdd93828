"""Softmax over the last dimension."""

from __future__ import annotations

import torch

from runtime.op import Op


class Softmax(Op):
    """Softmax over the last dimension."""

    name = "softmax"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)
