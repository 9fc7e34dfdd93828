"""Open a shared value to the client alone."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.messages import Protocol, ToClient
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import CLIENT, MAX_NOISE, RING_BITS, SERVER, Cost, Vis
from mergec.runtime.core.values import Held, Shared, decode, logical_shift
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.compare import WINDOW_BITS

REVEALED_FRAC = 12
"""Most fractional bits that the client sees."""


class Reveal(Op):
    """Open a shared value to the client alone, rounded, and with the server's noise if asked for.

    x [...], shared, |x| < 2**15 -> [...], held by the client. Rounds 1; per element 4 bytes
    online, 0 offline. Without noise, the result is at most one unit of the 12th fractional bit off.

    noise: standard deviation of normal noise that the server adds, 0 for none, at most MAX_NOISE.
    It hides the roundings of intermediate values: the client knows the odds of each, and without
    noise the logits of many equal queries tell it what each of them does to the logits, which is
    the model in its own basis. Anew for each element of each query. See `protocol`.
    """

    name = "reveal"
    schema = "(Tensor x, float noise=0.0) -> Tensor"
    operands = {"x": "share"}
    result = "revealed"
    domain = (-(2.0**15), 2.0**15)
    kind = Kind.OPENING

    @staticmethod
    def reference(x: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        unit, noise = 2.0**-REVEALED_FRAC, 2.0**-9
        return [
            Case([make.normal(3, 4)], unit + 1e-5),
            Case([make.small(2, 3, 4)], stock=1e-4),
            # Nine standard deviations: 1e-18 of all numbers are further away.
            Case([make.normal(3, 4), noise], 9 * noise + unit + 1e-5),
        ]

    @classmethod
    def visibility(cls, *operands: Vis) -> Vis:
        return Vis.CLIENT

    @classmethod
    def known_to(cls, *operands: Vis) -> Vis | None:
        """No message is needed for what the client knows already."""
        return operands[0] if operands[0] in (Vis.PUBLIC, Vis.CLIENT) else None

    @classmethod
    def cost(cls, x: Shared, noise: float = 0.0, *, fixed: int) -> Cost:
        return Cost(rounds=1, online=4 * x.share.numel())

    @classmethod
    def protocol(cls, ctx: Context, x: Shared, noise: float = 0.0) -> Protocol:
        """The server sends its share without the low bits; the client adds its own.

        In: |x| * 2**frac < 2**62 with any frac, |x| < 2**15. All bits below the 12th fractional one
        are dropped. Where more than 32 bits are dropped, 64 - drop are left: the sum is taken
        modulo 2**(64 - drop), which loses nothing, and its top bit is the sign. Out: held by the
        client; the value in whole units of 2**-12, less than one unit off.

        The client sees that and nothing else: beside its own share, the server's message is a
        function of the result. The noise is added to the server's share before anything is
        dropped. It is drawn from a seed that only the server has (`Context.server_words`), so
        neither the client nor the dealer can undo it, and a client has to average it away. The
        server sees nothing.
        """
        if not 0 <= noise <= MAX_NOISE:
            raise BundleError(f"mpc.reveal asks for noise {noise}; it can be 0 to {MAX_NOISE:g}")
        share = x.share
        if noise and ctx.party == SERVER:
            words = ctx.server_words(x.shape)
            share = share + torch.round(normal(words) * (noise * 2.0**x.frac)).to(torch.int64)
        drop = max(0, x.frac - REVEALED_FRAC)
        if share.is_meta:
            mine = ghost(x.shape, dtype=torch.int32)
        else:
            mine = logical_shift(share, drop).to(torch.int32)
            if drop and ctx.party == CLIENT:
                mine += 1  # Half for the lost carry, half for what is dropped.
        if ctx.party == SERVER:
            yield ToClient(mine)
            return Held(Vis.CLIENT, ghost(x.shape, dtype=torch.float64))
        other = yield ToClient(ghost(x.shape, dtype=torch.int32))
        if ctx.party == CLIENT:
            beyond = max(0, drop + WINDOW_BITS - RING_BITS)
            window = ((mine + other) << beyond) >> beyond
            return Held(Vis.CLIENT, decode(window, x.frac - drop))
        return Held(Vis.CLIENT, ghost(x.shape, dtype=torch.float64))

    @classmethod
    def stock(cls, x: Any, noise: float = 0.0) -> Any:
        """CrypTen's reduction of the shares to the client, without noise."""
        from mergec.runtime.crypten import compat as crypten

        value = crypten.plain_text(x, CLIENT)
        if value is None:
            value = torch.empty(x.shape, device="meta")
        return Held(Vis.CLIENT, value)


def normal(words: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers, float64, from uniform 64-bit words: the quantiles of 52 bits each.

    None is further than 8.2 from zero. With 53 bits the largest half would be rounded to 1, whose
    quantile is infinite.
    """
    uniform = (logical_shift(words, 12).to(torch.float64) + 0.5) * 2.0**-52
    return torch.special.ndtri(uniform)
