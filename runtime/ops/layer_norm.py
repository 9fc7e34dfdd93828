"""LayerNorm over the last dimension."""

from __future__ import annotations

import torch

from runtime.op import Op


class LayerNorm(Op):
    """LayerNorm over the last dimension."""

    name = "layer_norm"
    schema = "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
