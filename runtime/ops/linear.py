"""`x @ weight.T + bias`: `x` [..., I], `weight` [O, I], `bias` [O] give [..., O]."""

from __future__ import annotations

import torch

from runtime.op import Op


class Linear(Op):
    """`x @ weight.T + bias`: `x` [..., I], `weight` [O, I], `bias` [O] give [..., O]."""

    name = "linear"
    schema = "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)
