"""Open a share to the server under a mask that the client knows; the identity in the clear."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Sent, Shared
from mergec.runtime.protocols.weights import send, send_cost


class Send(Op):
    """Open a share to the server under a mask that the client knows; the identity in the clear."""

    name = "send"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    operands = {"x": "share"}

    @classmethod
    def scale(cls, x: int, *, fixed: int) -> int:
        return x

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return send_cost(x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        sent: Sent = yield from send(ctx, x)
        return sent

    @classmethod
    def stock(cls, x: Any) -> Any:
        """Nothing to do: CrypTen's products open what they need by themselves."""
        return x
