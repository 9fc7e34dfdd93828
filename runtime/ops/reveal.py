"""Open a shared value to the client, and to nobody else."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, ToClient
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import CLIENT, RING_BITS, SERVER, Cost, Vis
from mergec.runtime.core.values import Held, Shared, decode
from mergec.runtime.protocols.compare import WINDOW_BITS
from mergec.runtime.protocols.truncate import unbiased_window

REVEALED_FRAC = 16
"""Fractional bits that the client sees, of a value that has no more than 48."""


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
    domain = (-(2.0**15), 2.0**15)

    @classmethod
    def known_to(cls, *operands: Vis) -> Vis | None:
        """Only what the client knows already needs no message."""
        return operands[0] if operands[0] in (Vis.PUBLIC, Vis.CLIENT) else None

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return Cost(rounds=1, online=4 * x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """The server sends a 32-bit window of its share; the client adds its own.

        Its lowest bit is the 16th behind the point, or bit 32 of the share if that is higher; the
        result is at most one of its units off. Rounds 1, online 4 bytes per element. The client
        sees the value, as it should; the server's window is uniform beside the client's own. The
        bits below, which depend on the roundings of intermediate values, it does not see.
        """
        drop = min(max(0, x.frac - REVEALED_FRAC), RING_BITS - WINDOW_BITS)
        mine = unbiased_window(ctx, x.share, drop)
        if ctx.party == SERVER:
            yield ToClient(mine)
            return Held(Vis.CLIENT, torch.empty(x.shape, dtype=torch.float64, device="meta"))
        other = yield ToClient(torch.empty(x.shape, dtype=torch.int32, device="meta"))
        if ctx.party == CLIENT:
            return Held(Vis.CLIENT, decode(mine + other, x.frac - drop))
        return Held(Vis.CLIENT, torch.empty(x.shape, dtype=torch.float64, device="meta"))

    @classmethod
    def stock(cls, x: Any) -> Any:
        """CrypTen's reduction of the shares to the client."""
        value = x.get_plain_text(dst=CLIENT)
        if value is None:
            value = torch.empty(x.shape, device="meta")
        return Held(Vis.CLIENT, value)
