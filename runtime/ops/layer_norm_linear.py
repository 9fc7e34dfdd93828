"""The product of rows after LayerNorm."""

from __future__ import annotations

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.ops.layer_norm import LayerNorm
from mergec.runtime.ops.normed_linear import NormedLinear


class LayerNormLinear(NormedLinear):
    """LayerNorm(x) @ weight.T + bias: see `NormedLinear`.

    Rounds 3 for up to `rows` rows, else 4, or 5 without `fine`. Bytes: `cost`. Rows are centred as
    d x - sum(x), which is exact and local; the factor d is removed by the scale of the row.
    """

    name = "layer_norm_linear"
    norm = LayerNorm

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, weight, bias = make.normal(3, 48) + 2, make.normal(5, 48), make.normal(5)
        held = {"weight": "weight", "bias": "held"}
        shared = {"weight": "shared", "bias": "share"}
        few = [4.0**4, 0, [], True, 24, 9]
        return [
            Case([x, weight, bias, 1e-5, *few], 5e-4, forms=held),
            Case([x, weight, bias, 1e-5, *few], 5e-4, forms=shared),
            Case([x, weight, None, 1e-5, *few[:3], False, 24, 9], 5e-4, forms={"weight": "weight"}),
            Case([x, weight, bias, 1e-5, *few, [], True], 5e-4, forms=held),
            Case([x, weight, bias, 1e-5, 4.0**4], 5e-4, forms=held),
            Case([make.small(2, 3, 16), make.small(4, 16), make.small(4), 1e-5], stock=5e-2),
        ]

    @staticmethod
    def centred(rows: torch.Tensor) -> torch.Tensor:
        return rows * rows.shape[-1] - rows.sum(-1, keepdim=True)

    @staticmethod
    def factor(size: int) -> int:
        return size
