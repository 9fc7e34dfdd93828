"""Open a shared value to the client, and to nobody else."""

from __future__ import annotations

from typing import Any

import torch

from runtime.context import Context
from runtime.messages import Protocol, ToClient
from runtime.op import Op
from runtime.spec import CLIENT, SERVER, Cost, Vis
from runtime.values import Held, Shared, decode


class Reveal(Op):
    """Open a shared value to the client, and to nobody else."""

    name = "reveal"
    schema = "(Tensor x) -> Tensor"

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @classmethod
    def visibility(cls, *operands: Vis) -> Vis:
        return Vis.CLIENT

    operands = {"x": "share"}

    @classmethod
    def known_to(cls, *operands: Vis) -> Vis | None:
        """Only what the client knows already needs no message."""
        return operands[0] if operands[0] in (Vis.PUBLIC, Vis.CLIENT) else None

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return Cost(rounds=1, online=8 * x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """The server sends its share; the client adds its own.

        Rounds 1, online 8 bytes per element. The client sees the value, as it should; the server's
        share of it is uniform beside the client's own.
        """
        if ctx.party == SERVER:
            yield ToClient(x.share)
            return Held(Vis.CLIENT, torch.empty(x.shape, dtype=torch.float64, device="meta"))
        ghost = torch.empty(x.shape, dtype=torch.int64, device="meta")
        share = yield ToClient(ghost)
        if ctx.party == CLIENT:
            return Held(Vis.CLIENT, decode(x.share + share, x.frac))
        return Held(Vis.CLIENT, torch.empty(x.shape, dtype=torch.float64, device="meta"))

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's reduction of the shares to the client."""
        value = x.get_plain_text(dst=CLIENT)
        if value is None:
            value = torch.empty(x.shape, device="meta")
        return Held(Vis.CLIENT, value)
