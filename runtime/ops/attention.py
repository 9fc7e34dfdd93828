"""Grouped-query attention: softmax(cap(scale * q k^T) + mask) v."""

from __future__ import annotations

import torch

from runtime.op import Op


class Attention(Op):
    """Grouped-query attention: softmax(cap(scale * q k^T) + mask) v.

    q [B, H, N, D], k and v [B, G, L, D] with H a multiple of G, and an additive public mask that
    broadcasts to [B, H, N, L] (an entry of -1e4 or below means: never look there). With `softcap` c > 0 the scaled scores
    become c tanh(scores / c) before the mask (gemma2). Gives [B, H, N, D].
    """

    name = "attention"
    schema = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap=0.0) -> Tensor"

    @staticmethod
    def reference(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        groups = q.shape[-3] // k.shape[-3]
        k, v = (t.repeat_interleave(groups, -3) for t in (k, v))
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + mask
        return torch.matmul(torch.softmax(scores, -1), v)
