"""SiLU, x * sigmoid(x)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.cases import Case, Sampler, spread
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.saturate import (
    SCALAR_DOMAIN,
    Function,
    Tail,
    apply,
    apply_cost,
    function_input,
    reach_for,
    saturating,
    supplies_of,
)
from mergec.runtime.protocols.waves import Bend, Waves, wave_table


def _silu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1 + np.exp(-x)))


def _even(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / 2 * np.tanh(x / 2))


_TAILS = Tail(0, 0.0), Tail(1, 0.0)
_WAVES = Waves(
    _even, 16, 1115,
    (3, 0, -1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12, -13, -14, -15, -16, -17, -18),
)  # fmt: skip
_WIDTHS = (6, 6, 6, 6, 6, 5, 5, 5, 5, 5, 5, 5, 5, 4, 4, 4, 4, 4, 4, 4)

SILU = saturating(
    _silu, -15.5, 128, 14, 57, 16, *_TAILS,
    served=Function(wave_table(_WAVES, _WIDTHS, 6), 17, *_TAILS),
)  # fmt: skip


def _transform(w: float) -> float:
    return (math.pi * w / math.sinh(math.pi * w)) ** 2 * math.cosh(math.pi * w)


SILU_BEND = Bend(_even, 15, _transform, -17.0)


class Silu(Op):
    """SiLU, x * sigmoid(x), element by element.

    x [...] shared -> [...] shared. Rounds 2; per element 18 bytes online, 712 offline.
    Error below 3e-5 for |x| < 2**14. Each party sees what it sees in
    `protocols.saturate.apply`: masked values that are uniform whatever x is.

    reach: with n for it, |x| < 2**n - 2**4, and all that is dealt goes to the server.
    """

    name = "silu"
    schema = "(Tensor x, int reach=0) -> Tensor"
    operands = {"x": "window"}
    positions = Positions.ALL
    kind = Kind.ACTIVATION
    domain = SCALAR_DOMAIN

    @staticmethod
    def reference(x: torch.Tensor, reach: int = 0) -> torch.Tensor:
        return torch.nn.functional.silu(x)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([spread(20)], 5e-5),
            Case([torch.linspace(-40, 40, 3001).double(), 6], 5e-5),
            Case([make.small(2, 3, 4)], stock=1e-2),
        ]

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        return {"largest_input": float(arguments["x"].abs().max())}

    @classmethod
    def calibrate(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"reach": reach_for(measured.get("largest_input", math.inf))}

    @classmethod
    def supplies(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        return supplies_of(arguments["reach"])

    @classmethod
    def cost(cls, x: Shared, reach: int = 0, *, fixed: int) -> Cost:
        return apply_cost(SILU.from_server(reach), x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared, reach: int = 0) -> Protocol:
        """Cubics on windows of 1/4 between -15 and 15; 0 below, x above."""
        function = SILU.from_server(reach)
        share = yield from apply(ctx, function, function_input(ctx, x), ctx.fixed)
        return Shared(share, ctx.fixed)

    @classmethod
    def stock(cls, x: Any, reach: int = 0) -> Any:
        """By CrypTen's sigmoid."""
        return x * x.sigmoid()
