"""The cache [B, G, P, D] followed by the new entries [B, G, N, D]."""

from __future__ import annotations

import torch

from runtime.op import Op


class CacheAppend(Op):
    """The cache [B, G, P, D] followed by the new entries [B, G, N, D]."""

    name = "cache_append"
    schema = "(Tensor past, Tensor new) -> Tensor"

    @staticmethod
    def reference(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([past, new], -2)
