"""1 / sqrt(x) for positive x."""

from __future__ import annotations

import torch

from runtime.op import Op


class Rsqrt(Op):
    """1 / sqrt(x) for positive x."""

    name = "rsqrt"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.rsqrt(x)
