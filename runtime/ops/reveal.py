"""Open a shared value to the client alone."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, ToClient
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import CLIENT, RING_BITS, SERVER, Cost, Vis
from mergec.runtime.core.values import Held, Shared, decode
from mergec.runtime.protocols.compare import WINDOW_BITS
from mergec.runtime.protocols.truncate import unbiased_window

REVEALED_FRAC = 16
"""Fractional bits that the client sees, of a value with at most 48."""


class Reveal(Op):
    """Open a shared value to the client alone.

    x [...], shared, |x| < 2**15 -> [...], held by the client. Rounds 1; per element 4 bytes
    online, 0 offline. The result is at most one unit off: of the 16th fractional bit, or of bit 32
    of the share if that is higher. The client sees the value, as it should; the server's window is
    uniform beside the client's own. The bits below, which depend on the roundings of intermediate
    values, the client does not see. The server sees nothing.
    """

    name = "reveal"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "share"}
    result = "revealed"
    domain = (-(2.0**15), 2.0**15)
    kind = Kind.OPENING

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [Case([make.normal(3, 4)], 1e-5), Case([make.small(2, 3, 4)], stock=1e-4)]

    @classmethod
    def visibility(cls, *operands: Vis) -> Vis:
        return Vis.CLIENT

    @classmethod
    def known_to(cls, *operands: Vis) -> Vis | None:
        """No message is needed for what the client knows already."""
        return operands[0] if operands[0] in (Vis.PUBLIC, Vis.CLIENT) else None

    @classmethod
    def cost(cls, x: Shared, *, fixed: int) -> Cost:
        return Cost(rounds=1, online=4 * x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared) -> Protocol:
        """The server sends a 32-bit window of its share; the client adds its own.

        The window's lowest bit is the 16th behind the point, or bit 32 of the share if that is
        higher.
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
