"""A cache that is filled at once, and read by every later step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked, Sent


class CacheFill(Op):
    """Keys or values of a source text [B, G, S, D], as the cross-attention of all steps reads them.

    Opened, to both parties or, where a product with a constant alone reads the cache, to the
    server; so is the result. Local and exact: the identity. The entries are opened once, in the
    step that runs the encoder; later steps take the result of this op as an input
    (`runtime.program.program.Phase`).
    """

    name = "cache_fill"
    schema = "(Tensor new) -> Tensor"
    operands = {"new": "cache"}
    result = "cache"
    local = True
    kind = Kind.MOVEMENT
    prepares = "new"

    @staticmethod
    def reference(new: torch.Tensor) -> torch.Tensor:
        return new.clone()

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([make.normal(1, 2, 3, 4)], 1e-5),
            Case([make.small(1, 2, 5, 4)], stock=1e-4),
        ]

    @classmethod
    def cost(cls, new: Masked | Sent, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, new: Masked | Sent) -> Protocol:
        """Nothing to send: what was opened stays open under its mask."""
        yield from ()
        opened, mask = ctx.keep_cache(new.opened), ctx.keep_cache(new.mask)
        return replace(new, opened=opened, mask=mask)

    @classmethod
    def stock(cls, new: Any) -> Any:
        """Nothing to do: CrypTen keeps shares."""
        return new
