"""GELU in its erf form, or its tanh form."""

from __future__ import annotations

import torch

from runtime.op import Op


class Gelu(Op):
    """GELU in its erf form, or its tanh form."""

    name = "gelu"
    schema = "(Tensor x, bool tanh=False) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor, tanh: bool = False) -> torch.Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")
