"""The cache [B, G, P, D] followed by the new entries [B, G, N, D]."""

from __future__ import annotations

from typing import Any

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.op import Op
from runtime.spec import Cost
from runtime.values import Masked, Sent


class CacheAppend(Op):
    """The cache [B, G, P, D] followed by the new entries [B, G, N, D]."""

    name = "cache_append"
    schema = "(Tensor past, Tensor new) -> Tensor"

    @staticmethod
    def reference(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([past, new], -2)

    operands = {"past": "masked", "new": "masked"}
    """Or both "sent", where all that reads the cache is a product with a constant."""

    @classmethod
    def cost(cls, past: Masked | Sent, new: Masked | Sent, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, past: Masked | Sent, new: Masked | Sent) -> Protocol:
        """Concatenate two opened wires: an entry is opened once, when it enters the cache.

        No messages; what was opened under its own mask stays as it is.
        """
        yield from ()
        opened = torch.cat([past.opened, new.opened], -2)
        return type(past)(opened, torch.cat([past.mask, new.mask], -2), new.frac)

    @classmethod
    def stock(cls, past: Any, new: Any) -> Any:
        """CrypTen's concatenation of shares: local."""
        from runtime import crypten_compat as crypten

        return crypten.cat([past, new], -2)
