"""RMSNorm over the last dimension; the gain is `weight + offset` (gemma stores gain - 1)."""

from __future__ import annotations

import torch

from runtime.op import Op


class RmsNorm(Op):
    """RMSNorm over the last dimension; the gain is `weight + offset` (gemma stores gain - 1)."""

    name = "rms_norm"
    schema = "(Tensor x, Tensor? weight, float eps, float offset=0.0) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0) -> torch.Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y if weight is None else y * (weight + offset)
