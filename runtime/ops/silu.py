"""SiLU, x * sigmoid(x)."""

from __future__ import annotations

import torch

from runtime.op import Op


class Silu(Op):
    """SiLU, x * sigmoid(x)."""

    name = "silu"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x)
