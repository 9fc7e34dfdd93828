"""a x**2 + b x + c with public coefficients: the cheap replacement of GELU and SiLU."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.ops.scale import fraction
from mergec.runtime.protocols.local import as_share
from mergec.runtime.protocols.multiply import product_of_masked


class Quadratic(Op):
    """a x**2 + b x + c, element by element, with public numbers a, b and c.

    x [...], opened under a mask -> [...], shared. No message beyond the opening of x; 8 bytes
    offline per element. a is rounded to 16 significant bits, b and c to the result's scale. So the
    error is that of `square`, plus 2**-16 of a x**2.
    """

    name = "quadratic"
    schema = "(Tensor x, float a, float b, float c) -> Tensor"
    operands = {"x": "masked"}
    kind = Kind.ACTIVATION

    @staticmethod
    def reference(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
        return a * x * x + b * x + c

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([make.normal(3, 4), 0.125, 0.25, 0.5], 1e-4),
            Case([make.normal(3, 4), -0.3, 0.0, 1.7], 1e-4),
            Case([make.small(2, 3, 4), 0.125, 0.25, 0.5], stock=5e-4),
        ]

    @classmethod
    def scale(cls, x: int, a: float, b: float, c: float, *, fixed: int) -> int:
        return 2 * fixed + fraction(a)[1]

    @classmethod
    def cost(cls, x: Masked, a: float, b: float, c: float, *, fixed: int) -> Cost:
        return Cost(offline=8 * x.opened.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Masked, a: float, b: float, c: float) -> Protocol:
        """The square as in `square`; the rest is local.

        The result has fraction(a)[1] fractional bits more than a square.
        """
        yield from ()
        mantissa, bits = fraction(a)
        square = product_of_masked(ctx, x, x)
        frac = 2 * x.frac + bits
        if square.is_meta:
            return Shared(square, frac)
        share = square * mantissa + as_share(ctx, x, x.frac) * round(b * 2.0 ** (x.frac + bits))
        if ctx.party == CLIENT:
            share = share + round(c * 2.0**frac)
        return Shared(share, frac)

    @classmethod
    def stock(cls, x: Any, a: float, b: float, c: float) -> Any:
        """CrypTen's square, by one opening of a masked value, and products with numbers."""
        return x.square().mul(float(a)) + x.mul(float(b)) + float(c)
