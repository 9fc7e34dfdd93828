"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import PUBLIC, Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import LAST, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared, Wide, encode
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.wide import each_half, shifted_wide, sum_wide, times_public

TABLE_FRAC = 16
"""Fractional bits of the public cos and sin tables."""


class Rotary(Op):
    """Rotary position embedding of the leading R = cos.shape[-1] features of x [B, H, N, D].

    x shared, at any number of fractional bits; cos and sin public, broadcasting to [B, H, N, R]
    with R <= D. The result [B, H, N, D] is shared; features from R on pass unchanged. A pair of
    features is one of each half of the R, or two neighbours if `interleaved`. Local: no message;
    cos and sin are rounded to 16 fractional bits, which the result has beyond those of x.
    """

    name = "rotary"
    schema = "(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor"
    operands = {"x": "share"}
    local = True
    prepares = "x"
    parts = ("cos", "sin")

    @staticmethod
    def reference(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
    ) -> torch.Tensor:
        size = cos.shape[-1]
        rot, rest = x[..., :size], x[..., size:]
        return torch.cat([rot * cos + rotate(rot, interleaved) * sin, rest], -1)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        angles, tables = make.normal(3, 8), {"cos": PUBLIC, "sin": PUBLIC}
        x, half = make.small(1, 4, 3, 4), make.uniform(1, 1, 3, 4)
        few = half[..., :2]
        return [
            Case([make.normal(1, 2, 3, 8), angles.cos(), angles.sin()], 1e-4, forms=tables),
            Case([make.normal(1, 2, 3, 16), angles.cos(), angles.sin(), True], 1e-4, forms=tables),
            Case([x, half.cos(), half.sin()], stock=5e-4, forms=tables),
            Case([x, few.cos(), few.sin(), True], stock=5e-4, forms=tables),
        ]

    @classmethod
    def last_position(cls, dim: int) -> dict[str, Any] | None:
        """Each position has its own row of the tables; the features of one are mixed."""
        return dict.fromkeys(cls.tensors, LAST) if dim < -1 else None

    @classmethod
    def scale(cls, x: int, *args: object, fixed: int) -> int:
        return x + TABLE_FRAC

    @classmethod
    def cost(cls, x: Shared, *args: object, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        x: Shared | Wide,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool = False,
    ) -> Protocol:
        """A public linear map of each party's share."""
        yield from ()
        frac = x.frac + TABLE_FRAC
        if isinstance(x, Wide):
            return turned_wide(x, cos, sin, interleaved)
        if x.share.is_meta:
            return Shared(ghost(x.shape), frac)
        size = cos.shape[-1]
        rot, rest = x.share[..., :size], x.share[..., size:]
        cosine, sine = (
            to_device(encode(table, TABLE_FRAC), rot.device, "public") for table in (cos, sin)
        )
        turned = rot * cosine + rotate(rot, interleaved) * sine
        return Shared(torch.cat([turned, rest << TABLE_FRAC], -1), frac)

    @classmethod
    def stock(cls, x: Any, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> Any:
        """CrypTen's products with public numbers: local, with local truncation."""
        from mergec.runtime.crypten import compat as crypten

        size = cos.shape[-1]
        rot = x[..., :size]
        if interleaved:
            pair = crypten.stack([-rot[..., 1::2], rot[..., ::2]], -1)
            quarter = pair.reshape(*rot.shape)
        else:
            quarter = crypten.cat([-rot[..., size // 2 :], rot[..., : size // 2]], -1)
        turned = rot * cos.to(torch.float32) + quarter * sin.to(torch.float32)
        if size == x.shape[-1]:
            return turned
        return crypten.cat([turned, x[..., size:]], -1)


def rotate(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """A quarter turn of each feature pair: (a, b) becomes (-b, a)."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def turned_wide(x: Wide, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> Wide:
    """The same of a share modulo 2**128, by each party."""
    frac, size = x.frac + TABLE_FRAC, cos.shape[-1]
    if x.low.is_meta:
        return Wide(ghost(x.shape), ghost(x.shape), frac)
    cosine, sine = (
        to_device(encode(table, TABLE_FRAC), x.low.device, "public") for table in (cos, sin)
    )
    rot = each_half(x, lambda half: half[..., :size])
    # A sign belongs to a whole number, not to each half of it: it goes into the sine.
    sign = rotate(torch.ones_like(sine), interleaved)
    quarter = each_half(rot, lambda half: rotate(half, interleaved) * sign)
    turned = sum_wide(times_public(rot, cosine), times_public(quarter, sine * sign), frac)
    if size == x.shape[-1]:
        return turned
    rest = each_half(x, lambda half: half[..., size:])
    rest = shifted_wide(rest, torch.tensor(TABLE_FRAC))
    low = torch.cat([turned.low, rest.low], -1)
    return Wide(low, torch.cat([turned.high, rest.high], -1), frac)
