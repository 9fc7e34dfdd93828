"""Product of a tensor and a public number."""

from __future__ import annotations

import math
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Form, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.kernels.ghosts import ghost


class Scale(Op):
    """Product of a tensor and a public number: x [...], shared -> [...], shared.

    Local: no message. A factor that is a power of two only moves the binary point and is exact; any
    other is rounded to 16 significant bits, takes x at the program's fractional bits, and adds up
    to 16 to them, or more if it is below 1.
    """

    name = "scale"
    schema = "(Tensor x, float factor) -> Tensor"
    local = True
    positions = Positions.ALL
    prepares = "x"

    @staticmethod
    def reference(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x = make.small(2, 3, 4)
        return [
            Case([make.normal(3, 4), 0.125], 1e-5),
            Case([make.normal(3, 4), -4.0], 1e-4),
            Case([make.normal(3, 4), -0.3], 3e-5),
            Case([x, 0.3], stock=5e-4),
            Case([x, -2.0], stock=5e-4),
        ]

    @classmethod
    def forms(cls, x: Any, factor: float) -> dict[str, Form]:
        return {"x": "share" if _power_of_two(factor) is not None else "fixed"}

    @classmethod
    def scale(cls, x: int, factor: float, *, fixed: int) -> int:
        return x + fraction(factor)[1]

    @classmethod
    def cost(cls, x: Shared, factor: float, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, x: Shared, factor: float) -> Protocol:
        """Each party multiplies its share by a 16-bit integer and moves the binary point."""
        yield from ()
        mantissa, bits = fraction(factor)
        share = ghost(x.shape) if x.share.is_meta else x.share * mantissa
        return Shared(share, x.frac + bits)

    @classmethod
    def stock(cls, x: Any, factor: float) -> Any:
        """CrypTen's product with a public number: local, with local truncation."""
        return x.mul(float(factor))


_MANTISSA_BITS = 16


def _power_of_two(factor: float) -> int | None:
    mantissa, exponent = math.frexp(abs(factor))
    return exponent - 1 if mantissa == 0.5 else None


def fraction(factor: float) -> tuple[int, int]:
    """Integers m, t: factor = m * 2**-t up to one part in 2**16; m is +-1 for a power of two."""
    if factor == 0:
        return 0, 0
    exponent = _power_of_two(factor)
    if exponent is not None:
        return (1 if factor > 0 else -1), -exponent
    bits = max(0, _MANTISSA_BITS - math.frexp(factor)[1])
    return round(factor * 2.0**bits), bits
