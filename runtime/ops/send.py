"""Open a share to the server under a mask that the client knows; the identity in the clear."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Sent, Shared
from mergec.runtime.protocols.weights import send, send_cost


class Send(Op):
    """Open a share to the server under a mask that the client knows; the identity in the clear.

    x [...], shared -> [...], sent: the server knows x - a, the client the uniform mask a.
    Rounds 1; per element 8 bytes online, 0 offline. Exact. The server sees x - a, uniform as a is
    fresh; the client sees nothing.
    """

    name = "send"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "share"}
    result = "sent"
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
        return send_cost(x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """See `protocols.weights.send`."""
        sent: Sent = yield from send(ctx, x)
        return sent

    @classmethod
    def stock(cls, x: Any) -> Any:
        """Nothing to do: CrypTen's products open what they need."""
        return x
