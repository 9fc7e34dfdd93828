"""Rotary position embedding of the leading `cos.shape[-1]` features of x [B, H, N, D]."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared, encode
from mergec.runtime.protocols.local import ghost

TABLE_FRAC = 16
"""Fractional bits of the public cos and sin tables."""


class Rotary(Op):
    """Rotary position embedding of the leading `cos.shape[-1]` features of x [B, H, N, D].

    cos and sin are public and broadcast to [B, H, N, R] with R <= D; the other features pass. Pairs
    are the two halves of the R features, or neighbours when `interleaved`.
    """

    name = "rotary"
    schema = "(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor"

    @staticmethod
    def reference(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
    ) -> torch.Tensor:
        size = cos.shape[-1]
        rot, rest = x[..., :size], x[..., size:]
        return torch.cat([rot * cos + rotate(rot, interleaved) * sin, rest], -1)

    operands = {"x": "share"}

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
        x: Shared,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool = False,
    ) -> Protocol:
        """Local: a public linear map of each party's share, which gains 16 fractional bits."""
        yield from ()
        frac = x.frac + TABLE_FRAC
        if x.share.is_meta:
            return Shared(ghost(x.shape), frac)
        size = cos.shape[-1]
        rot, rest = x.share[..., :size], x.share[..., size:]
        cosine, sine = (encode(table, TABLE_FRAC).to(rot.device) for table in (cos, sin))
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
