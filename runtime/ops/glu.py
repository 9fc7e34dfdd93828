"""Gated unit: act(gate) * up, with act one of silu, gelu, gelu_tanh, relu."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import FRACTIONAL_BITS, RANGE_MARGIN_BITS, Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.ops.gelu import GELU, GELU_BEND, GELU_TANH, GELU_TANH_BEND, Gelu, rows_of
from mergec.runtime.ops.silu import SILU, SILU_BEND
from mergec.runtime.protocols.gated import SPANS, Gated, gated, gated_cost
from mergec.runtime.protocols.multiply import product_of_masked
from mergec.runtime.protocols.opening import Cut, open_masked, open_masked_cost
from mergec.runtime.protocols.rectify import rectify, rectify_cost
from mergec.runtime.protocols.saturate import (
    SCALAR_DOMAIN,
    apply,
    apply_cost,
    function_input,
    reach_for,
    supplies_of,
)
from mergec.runtime.protocols.truncate import truncate, truncate_cost

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}

FUNCTIONS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}

_BENDS = {"silu": SILU_BEND, "gelu": GELU_BEND, "gelu_tanh": GELU_TANH_BEND}


class Glu(Op):
    """Gated unit: act(gate) * up, with act one of silu, gelu, gelu_tanh, relu.

    gate and up [..., D], shared, give [..., D], shared, with 32 fractional bits. Rounds 2; per
    element 34 bytes online (relu: 26), and 16 more with 16 offline if `up` has to be truncated to
    the program's fractional bits. Error: that of the activation's own op (|gate| < 2**14) times
    |up|, and that of rounding `up` to 16 fractional bits times |gate|. Each party sees what it sees
    in the activation, and the opening of `up` under a fresh mask.

    reach: with n for it, |gate| < 2**n - 2**4, and all that is dealt goes to the server. relu needs
    none for that.

    apart: the activation is opened under a fresh mask of its own, and multiplied then. A round and
    16 bytes online more, but 96 bytes (relu: 32) dealt less, as what selects the activation's parts
    need not be dealt times the mask of `up`.

    alone: the largest number of rows that are computed by one opening, with |gate| <= span (48, 64
    or 80, and not relu): rounds 1; per element 24 bytes online, or 16 if `up` has 47 fractional
    bits or more, and some 2,200 to 3,200 offline. Error below 3e-5 times |up|, and that of rounding
    `up` to 15 fractional bits times |gate|. See `protocols.gated` for what each party sees.
    """

    name = "glu"
    schema = (
        "(Tensor gate, Tensor up, str act, int reach=0, bool apart=False, int alone=0, int span=0)"
        " -> Tensor"
    )
    operands = {"gate": "window", "up": "share"}
    positions = Positions.ALL
    domain = SCALAR_DOMAIN
    kind = Kind.ACTIVATION

    @staticmethod
    def reference(
        gate: torch.Tensor,
        up: torch.Tensor,
        act: str,
        reach: int = 0,
        apart: bool = False,
        alone: int = 0,
        span: int = 0,
    ) -> torch.Tensor:
        return ACTIVATIONS[act](gate) * up

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        x, y = make.small(2, 3, 4), make.small(2, 3, 4)
        mine = [
            Case([make.normal(3, 8, scale=3), make.normal(3, 8), act], 2e-4) for act in ACTIVATIONS
        ]
        mine += [
            Case([make.normal(3, 8, scale=9), make.normal(3, 8), act, 7], 5e-4) for act in FUNCTIONS
        ]
        mine += [
            Case([make.normal(3, 8, scale=3), make.normal(3, 8), act, reach, True], 2e-4)
            for act, reach in (("silu", 7), ("gelu", 0), ("relu", 0))
        ]
        mine += [
            Case([make.normal(3, 8, scale=9), make.normal(3, 8), act, 7, False, 3, span], 2e-3)
            for act in FUNCTIONS
            for span in SPANS
        ]
        return [*mine, *(Case([x, y, act], stock=1e-2) for act in ACTIVATIONS)]

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        return {"largest_input": float(arguments["gate"].abs().max())}

    @classmethod
    def calibrate(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        largest = measured.get("largest_input", math.inf)
        if arguments["act"] not in FUNCTIONS:
            return {"reach": 0, "alone": 0, "span": 0}
        needed = largest * 2.0**RANGE_MARGIN_BITS
        span = next((span for span in SPANS if needed <= span), 0) if arguments["alone"] else 0
        alone = arguments["alone"] if span else 0
        return {"reach": reach_for(largest), "alone": alone, "span": span}

    @classmethod
    def variants(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        return {"apart": False}, {"apart": True}

    @classmethod
    def supplies(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        # One opening is for networks where the dealer is near the server.
        return () if arguments["alone"] else supplies_of(arguments["reach"])

    @classmethod
    def rounded(cls, fracs: Mapping[str, int], arguments: Mapping[str, Any]) -> torch.Tensor:
        """Both factors are truncated to the program's fractional bits."""

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return (x * 2.0**FRACTIONAL_BITS).round() * 2.0**-FRACTIONAL_BITS

        active = ACTIVATIONS[arguments["act"]](arguments["gate"])
        return rounded(active) * rounded(arguments["up"])

    @classmethod
    def scale(cls, *args: object, fixed: int) -> int:
        return 2 * fixed

    @classmethod
    def cost(
        cls,
        gate: Shared,
        up: Shared,
        act: str,
        reach: int = 0,
        apart: bool = False,
        alone: int = 0,
        span: int = 0,
        *,
        fixed: int,
    ) -> Cost:
        count, shift = gate.share.numel(), up.frac - fixed
        if rows_of(gate) <= alone:
            return gated_cost(gated_table(act, span, up.frac), count)

        def active(factor: int | None) -> Cost:
            if act == "relu":
                return rectify_cost(count, factor)
            return apply_cost(FUNCTIONS[act].from_server(reach), count, factor)

        if not apart:
            return active(shift)
        opened = open_masked_cost(count)
        factor = truncate_cost(count, shift) + opened
        return active(None).beside(factor) + opened + Cost(offline=8 * count)

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        gate: Shared,
        up: Shared,
        act: str,
        reach: int = 0,
        apart: bool = False,
        alone: int = 0,
        span: int = 0,
    ) -> Protocol:
        """The activation's protocol, which multiplies by `up` in the same two rounds; or then."""
        narrow = function_input(ctx, gate)
        if rows_of(gate) <= alone:
            share = yield from gated(ctx, gated_table(act, span, up.frac), narrow, up)
            return Shared(share, 2 * ctx.fixed)
        if not apart:
            share = yield from _active(ctx, narrow, act, reach, up)
            return Shared(share, 2 * ctx.fixed)
        share, factor = yield from together(_active(ctx, narrow, act, reach), _opened(ctx, up))
        active = yield from open_masked(ctx, Shared(share, ctx.fixed))
        return Shared(product_of_masked(ctx, active, factor), 2 * ctx.fixed)

    @classmethod
    def stock(
        cls,
        gate: Any,
        up: Any,
        act: str,
        reach: int = 0,
        apart: bool = False,
        alone: int = 0,
        span: int = 0,
    ) -> Any:
        """CrypTen's activation, then its product."""
        if act == "silu":
            active = gate * gate.sigmoid()
        elif act == "relu":
            active = gate.relu()
        else:
            active = Gelu.stock(gate, act == "gelu_tanh")
        return active * up


@cache
def gated_table(act: str, span: int, frac: int) -> Gated:
    """The table of a unit by one opening, whose `up` has so many fractional bits.

    Raises ValueError for a span that is not in `SPANS`.
    """
    if span not in SPANS:
        raise ValueError(f"no table serves gates up to {span} by one opening")
    return Gated(_BENDS[act].curve(span), frac)


def _active(
    ctx: Context, gate: Cut, act: str, reach: int, factor: Shared | None = None
) -> Protocol:
    """Shares of the activation with the program's fractional bits, or of it times a factor."""
    if act == "relu":
        return rectify(ctx, gate, factor)
    return apply(ctx, FUNCTIONS[act].from_server(reach), gate, ctx.fixed, factor)


def _opened(ctx: Context, x: Shared) -> Protocol:
    """x, truncated to the program's fractional bits and opened under a fresh mask."""
    share = yield from truncate(ctx, x.share, x.frac - ctx.fixed)
    found = yield from open_masked(ctx, Shared(share, ctx.fixed))
    return found
