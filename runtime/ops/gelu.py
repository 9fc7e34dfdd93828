"""GELU in its erf form, or its tanh form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.cases import Case, Sampler, spread
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import RING_BITS, Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.pieces import Pieces
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
from mergec.runtime.protocols.waves import (
    Bend,
    Waves,
    evaluate_alone,
    evaluate_alone_cost,
    wave_table,
)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.vectorize(math.erf)(x / math.sqrt(2)))


def _tanh(x: np.ndarray) -> np.ndarray:
    return np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


_SIZES = (2, -1, -3, -4, -6, -8, -10, -13, -16)
_WIDTHS = (6, 6, 5, 5, 5, 5, 4, 4, 4)


def _saturating(odd: Callable[[np.ndarray], np.ndarray], cycles: int) -> Function:
    """x/2 (1 + odd(x))."""
    waves = Waves(lambda x: x / 2 * odd(x), 7, cycles, _SIZES)
    tails = Tail(0, 0.0), Tail(1, 0.0)
    served = Function(wave_table(waves, _WIDTHS, 5), 17, *tails)
    return saturating(lambda x: 0.5 * x * (1 + odd(x)), -7, 128, 13, 58, 17, *tails, served)


GELU, GELU_TANH = _saturating(_erf, 2744), _saturating(_tanh, 2795)


_ALONE_INTEGER_BITS = 28
ALONE_FRAC = RING_BITS - _ALONE_INTEGER_BITS
"""Fractional bits of a GELU by one opening."""

_ALONE_BITS = 39
"""Fractional bits of a dealt word and of the public number that it is multiplied by, together."""

_ALONE_REACHES = 6, 7
"""For which n a GELU by one opening serves |x| < 2**n - 2**4."""


def _transform(w: float) -> float:
    """That of the erf form; coefficients of the tanh form are less than twice as large."""
    return (1 + w * w) * math.exp(-w * w / 2)


GELU_BEND = Bend(lambda x: x / 2 * _erf(x), 5, _transform, -18.5)
GELU_TANH_BEND = Bend(lambda x: x / 2 * _tanh(x), 5, _transform, -18.5)


def alone_table(tanh: bool, reach: int) -> Pieces:
    """The table of a GELU by one opening. Raises ValueError for a reach that has none."""
    if reach not in _ALONE_REACHES:
        raise ValueError(f"no table serves a GELU for inputs up to 2**{reach} by one opening")
    return _made(tanh, reach)


@cache
def _made(tanh: bool, reach: int) -> Pieces:
    waves = (GELU_TANH_BEND if tanh else GELU_BEND).curve(2**reach - 2**4)
    bits = (_ALONE_INTEGER_BITS + _ALONE_BITS + size for size in waves.sizes)
    widths = [min(8, max(4, -(-needed // 8))) for needed in bits]
    # A table is a multiple of four bytes.
    widths[-1] += sum(widths) % 2
    return wave_table(waves, tuple(widths), _ALONE_INTEGER_BITS)


class Gelu(Op):
    """GELU in its erf form, or its tanh form if `tanh`; element by element.

    x [...] shared -> [...] shared. Rounds 2; per element 18 bytes online, 680 offline.
    Error below 2e-5
    for |x| < 2**14. Each party sees what it sees in
    `protocols.saturate.apply`: masked values that are uniform whatever x is.

    reach: with n for it, |x| < 2**n - 2**4, the error is below 3e-5, and all that is dealt goes to
    the server.

    alone: the largest number of rows that are computed by one opening: rounds 1, online 8 bytes per
    element, offline 616 (reach 6) or 1,276 (7), error below 6e-5, or 8e-5 where x has more than 16
    fractional bits, to which it is cut. If it is not zero, the result has 36 fractional bits,
    however it is computed.
    """

    name = "gelu"
    schema = "(Tensor x, bool tanh=False, int reach=0, int alone=0) -> Tensor"
    operands = {"x": "window"}
    positions = Positions.ALL
    kind = Kind.ACTIVATION
    domain = SCALAR_DOMAIN

    @staticmethod
    def reference(
        x: torch.Tensor, tanh: bool = False, reach: int = 0, alone: int = 0
    ) -> torch.Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x = make.small(2, 3, 4)
        return [
            Case([spread(10)], 5e-5),
            Case([spread(10), True], 5e-5),
            Case([torch.linspace(-40, 40, 3001).double(), False, 6], 5e-5),
            Case([torch.linspace(-9, 9, 3001).double(), True, 8], 5e-5),
            Case([torch.linspace(-48, 48, 3000).double().reshape(3, -1), False, 6, 3], 8e-5),
            Case([torch.linspace(-112, 112, 3000).double().reshape(3, -1), True, 7, 8], 8e-5),
            Case([torch.linspace(-48, 48, 3000).double().reshape(3, -1), True, 6, 2], 5e-5),
            Case([x], stock=1e-2),
            Case([x, True], stock=1e-2),
        ]

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        return {"largest_input": float(arguments["x"].abs().max())}

    @classmethod
    def calibrate(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        reach = reach_for(measured.get("largest_input", math.inf))
        return {"reach": reach, "alone": arguments["alone"] if reach in _ALONE_REACHES else 0}

    @classmethod
    def scale(
        cls, x: int, tanh: bool = False, reach: int = 0, alone: int = 0, *, fixed: int
    ) -> int:
        return ALONE_FRAC if alone else fixed

    @classmethod
    def supplies(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        return () if arguments["alone"] else supplies_of(arguments["reach"])

    @classmethod
    def cost(
        cls, x: Shared, tanh: bool = False, reach: int = 0, alone: int = 0, *, fixed: int
    ) -> Cost:
        count = x.share.numel()
        if rows_of(x) <= alone:
            return evaluate_alone_cost(alone_table(tanh, reach), count)
        return apply_cost((GELU_TANH if tanh else GELU).from_server(reach), count)

    @classmethod
    def protocol(
        cls, ctx: Context, x: Shared, tanh: bool = False, reach: int = 0, alone: int = 0
    ) -> Protocol:
        """Cubics on windows of 1/8 between -7.25 and 7.25, 0 below, x above; or cosines."""
        narrow = function_input(ctx, x)
        if rows_of(x) <= alone:
            share = yield from evaluate_alone(ctx, alone_table(tanh, reach), narrow)
            return Shared(share, ALONE_FRAC)
        function = (GELU_TANH if tanh else GELU).from_server(reach)
        share = yield from apply(ctx, function, narrow, ctx.fixed)
        if not alone:
            return Shared(share, ctx.fixed)
        return Shared(share if share.is_meta else share << (ALONE_FRAC - ctx.fixed), ALONE_FRAC)

    @classmethod
    def stock(cls, x: Any, tanh: bool = False, reach: int = 0, alone: int = 0) -> Any:
        """The tanh form of either, as 2 sigmoid - 1: CrypTen's erf diverges beyond 2.

        It differs from the erf form by up to 5e-4. For |x| < 20, where the cube fits.
        """
        inner = (x.square().mul(0.044715) + 1) * x
        return x * inner.mul(2 * math.sqrt(2 / math.pi)).sigmoid()


def rows_of(x: Shared) -> int:
    """How many rows a value has."""
    return math.prod(x.shape[:-1])
