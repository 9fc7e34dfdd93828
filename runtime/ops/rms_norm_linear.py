"""The product of rows after RMSNorm."""

from __future__ import annotations

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.ops.normed_linear import NormedLinear
from mergec.runtime.ops.rms_norm import RmsNorm


class RmsNormLinear(NormedLinear):
    """(x / sqrt(mean(x**2) + eps)) @ weight.T + bias: see `NormedLinear`.

    Rounds 3 for up to `rows` rows, else 4, or 5 without `fine`. Bytes: `cost`.
    """

    name = "rms_norm_linear"
    norm = RmsNorm

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, weight, bias = make.normal(3, 64), make.normal(5, 64), make.normal(5)
        held = {"weight": "weight", "bias": "held"}
        shared = {"weight": "shared", "bias": "share"}
        few = [4.0**4, 0, [], True, 24, 9]
        return [
            Case([x, weight, bias, 1e-5, *few], 5e-4, forms=held),
            Case([x, weight, bias, 1e-5, *few], 5e-4, forms=shared),
            Case([x, weight, None, 1e-5, *few[:3], False, 24, 9], 5e-4, forms={"weight": "weight"}),
            Case([x, weight, bias, 1e-5, *few, [], True], 5e-4, forms=held),
            Case([x, weight, bias, 1e-5, 4.0**4], 5e-4, forms=held),
            Case([x, weight, None, 1e-5, *few[:3], False], 5e-4, forms={"weight": "weight"}),
            *(
                Case([x, weight, bias, 1e-5, 4.0**8, *few[1:5], most, shrunk], 5e-4, forms=held)
                for most in (9, 0)
                for shrunk in ([5, 0, 2, 3, 56, 0, 1, 6], [63, 0, 1, 4])
            ),
            Case([make.small(2, 3, 16), make.small(4, 16), make.small(4), 1e-5], stock=5e-2),
        ]

    @staticmethod
    def centred(rows: torch.Tensor) -> torch.Tensor:
        return rows

    @staticmethod
    def factor(size: int) -> int:
        return 1
