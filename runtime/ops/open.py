"""Open a share to both parties under a mask; the identity in the clear."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.protocols.opening import open_masked, open_masked_cost


class Open(Op):
    """Open a share to both parties under a mask; the identity in the clear.

    x [...], shared -> [...], opened: both parties know x + r, and nobody the uniform mask r.
    Rounds 1; per element 16 bytes online, 0 offline. Exact. Each party sees the other's share of
    x + r, uniform as r is, and used for this value alone.
    """

    name = "open"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "share"}
    result = "masked"
    kind = Kind.OPENING
    prepares = "x"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [Case([make.normal(3, 4)], 1e-5), Case([make.small(2, 3, 4)], stock=1e-4)]

    @classmethod
    def scale(cls, x: int, *, fixed: int) -> int:
        return x

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return open_masked_cost(x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """See `protocols.opening.open_masked`."""
        opened: Masked = yield from open_masked(ctx, x)
        return opened

    @classmethod
    def stock(cls, x: Any) -> Any:
        """Nothing to do: CrypTen's products open what they need."""
        return x
