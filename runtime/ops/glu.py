"""Gated unit: act(gate) * up, with act one of silu, gelu, gelu_tanh, relu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.ops.gelu import GELU, GELU_TANH, Gelu
from mergec.runtime.ops.silu import SILU
from mergec.runtime.protocols.rectify import rectify, rectify_cost
from mergec.runtime.protocols.saturate import SCALAR_DOMAIN, apply, apply_cost, function_input

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}

FUNCTIONS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}


class Glu(Op):
    """Gated unit: act(gate) * up, with act one of silu, gelu, gelu_tanh, relu."""

    name = "glu"
    schema = "(Tensor gate, Tensor up, str act) -> Tensor"

    @staticmethod
    def reference(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
        return ACTIVATIONS[act](gate) * up

    operands = {"gate": "window", "up": "share"}
    domain = SCALAR_DOMAIN

    @classmethod
    def scale(cls, *args: object, fixed: int) -> int:
        return 2 * fixed

    @classmethod
    def cost(cls, gate: Shared, up: Shared, act: str, *, fixed: int) -> Cost:
        count = gate.share.numel()
        shift = up.frac - fixed
        if act == "relu":
            return rectify_cost(count, shift)
        return apply_cost(FUNCTIONS[act], count, shift)

    @classmethod
    def protocol(cls, ctx: Context, gate: Shared, up: Shared, act: str) -> Protocol:
        """The activation's protocol, which multiplies by `up` in the same two rounds.

        Error of the activation as in its own op (|gate| < 2**14), times |up|, and that of rounding
        `up` to 16 fractional bits, times |gate|.
        """
        narrow = function_input(ctx, gate)
        if act == "relu":
            share = yield from rectify(ctx, narrow, up)
        else:
            share = yield from apply(ctx, FUNCTIONS[act], narrow, ctx.fixed, up)
        return Shared(share, 2 * ctx.fixed)

    @classmethod
    def stock(cls, gate: Any, up: Any, act: str) -> Any:
        """CrypTen's activation, then its product."""
        if act == "silu":
            active = gate * gate.sigmoid()
        elif act == "relu":
            active = gate.relu()
        else:
            active = Gelu.stock(gate, act == "gelu_tanh")
        return active * up
