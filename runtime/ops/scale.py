"""Product of a tensor and a public number."""

from __future__ import annotations

import torch

from runtime.op import Op


class Scale(Op):
    """Product of a tensor and a public number."""

    name = "scale"
    schema = "(Tensor x, float factor) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor
