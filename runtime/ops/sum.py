"""Sum over the last dimension, which is kept."""

from __future__ import annotations

import torch

from runtime.op import Op


class Sum(Op):
    """Sum over the last dimension, which is kept."""

    name = "sum"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1, keepdim=True)
