"""Rows of a table: `ids` [..., N], `weight` [V, D] give [..., N, D]."""

from __future__ import annotations

import torch

from runtime.op import Op


class Embedding(Op):
    """Rows of a table: `ids` [..., N], `weight` [V, D] give [..., N, D]."""

    name = "embedding"
    schema = "(Tensor ids, Tensor weight) -> Tensor"

    @staticmethod
    def reference(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, weight)
