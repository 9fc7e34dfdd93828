"""Rotary position embedding of the leading `cos.shape[-1]` features of x [B, H, N, D]."""

from __future__ import annotations

import torch

from runtime.op import Op


class Rotary(Op):
    """Rotary position embedding of the leading `cos.shape[-1]` features of x [B, H, N, D].

    cos and sin are public and broadcast to [B, H, N, R] with R <= D; the other features pass. Pairs are the
    two halves of the R features, or neighbours when `interleaved`.
    """

    name = "rotary"
    schema = "(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor"

    @staticmethod
    def reference(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
    ) -> torch.Tensor:
        size = cos.shape[-1]
        rot, rest = x[..., :size], x[..., size:]
        return torch.cat([rot * cos + rotate(rot, interleaved) * sin, rest], -1)


def rotate(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """A quarter turn of each feature pair: (a, b) becomes (-b, a)."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)
