"""The largest entries of a row, as ones among zeros."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.opening import Cut
from mergec.runtime.protocols.saturate import SCALAR_DOMAIN, function_input
from mergec.runtime.protocols.top_k import LONGEST, top_k, top_k_cost


class TopK(Op):
    """1 for the k largest entries of each row, and 0 for the others.

    x [..., D], shared, gives [..., D], shared, both exact: |x| < 2**14, D from 2 to 256. Which
    entries they are stays secret. Entries are compared with 16 fractional bits, to which they are
    cut by less than two units; so of entries that are closer than 2**-15 any may count as larger,
    and of equal ones at 16 fractional bits the first does. Rounds, bytes and what each party sees:
    `protocols.top_k`.
    """

    name = "top_k"
    schema = "(Tensor x, int k) -> Tensor"
    operands = {"x": "window"}
    positions = Positions.ROWS
    domain = SCALAR_DOMAIN
    kind = Kind.ACTIVATION

    @staticmethod
    def reference(x: torch.Tensor, k: int) -> torch.Tensor:
        # `topk` does not say which of equal entries it returns.
        order = torch.sort(x, dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(x).scatter(-1, order[..., :k], 1.0)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        return [
            Case([make.normal(3, 8), 2], 1e-9),
            Case([make.normal(2, 2, 37, scale=99), 8], 1e-9),
            Case([make.small(2, 9), 3], stock=1e-3),
        ]

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        return {"entries": arguments["x"].shape[-1]}

    @classmethod
    def refusal(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        entries = measured.get("entries", LONGEST)
        if 2 <= entries <= LONGEST:
            return ""
        return f"it chooses from {entries}; its protocol supports from 2 to {LONGEST}"

    @classmethod
    def cost(cls, x: Shared, k: int, *, fixed: int) -> Cost:
        return top_k_cost(math.prod(x.shape[:-1]), x.shape[-1])

    @classmethod
    def protocol(cls, ctx: Context, x: Shared, k: int) -> Protocol:
        """All pairs of a row are compared, and each entry's rank with k."""
        rows = Shared(x.share.reshape(-1, x.shape[-1]), x.frac)
        keys: Cut = function_input(ctx, rows)
        share = yield from top_k(ctx, keys, k, ctx.fixed)
        return Shared(share.reshape(x.shape), ctx.fixed)

    @classmethod
    def stock(cls, x: Any, k: int) -> Any:
        """The largest by CrypTen's argmax, k times, each time below the others from then on."""
        chosen = 0.0
        for _ in range(k):
            largest = x.argmax(-1, one_hot=True)
            chosen, x = largest + chosen, x - largest * 2.0 ** (1 + int(math.log2(cls.domain[1])))
        return chosen
