"""x * x; cheaper than mul because both factors share one mask."""

from __future__ import annotations

import torch

from runtime.op import Op


class Square(Op):
    """x * x; cheaper than mul because both factors share one mask."""

    name = "square"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x * x
