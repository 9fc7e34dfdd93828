"""Rows of a table: `ids` [..., N], `weight` [V, D] give [..., N, D]."""

from __future__ import annotations

from typing import Any

import torch

from runtime.context import Context
from runtime.messages import Protocol
from runtime.op import Op
from runtime.protocols.weights import send, send_cost, table_rows
from runtime.spec import CLIENT, SERVER, Cost
from runtime.values import Held, Shared, Weight


class Embedding(Op):
    """Rows of a table: `ids` [..., N], `weight` [V, D] give [..., N, D]."""

    name = "embedding"
    schema = "(Tensor ids, Tensor weight) -> Tensor"

    @staticmethod
    def reference(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, weight)

    operands = {"ids": "held"}
    weights = ("weight",)

    @classmethod
    def cost(cls, ids: Held, weight: Weight, *, fixed: int) -> Cost:
        tokens = ids.value.numel()
        vocabulary, features = weight.shape
        return send_cost(tokens * vocabulary) + Cost(offline=8 * tokens * features)

    @classmethod
    def protocol(cls, ctx: Context, ids: Held, weight: Weight) -> Protocol:
        """The client's one-hot rows times the server's table.

        In: token ids at the client, Weight [V, D]. Out: Shared with the weight's fractional bits.
        Rounds 1, online 8 V bytes per token, client to server; offline 8 D bytes per token.
        The server sees one-hot rows minus a fresh uniform mask; the client sees nothing. MERGE
        (AAAI 2024) names this product as the cost of private embedding; the one-way form is rule 2
        of docs/protocols.md.
        """
        shape = (*ids.shape, weight.shape[0])
        if ctx.party == CLIENT:
            rows = torch.zeros(shape, dtype=torch.int64, device=ctx.device)
            rows.scatter_(-1, ids.value.to(ctx.device)[..., None], 1)
        elif ctx.party == SERVER:
            rows = torch.zeros(shape, dtype=torch.int64, device=ctx.device)
        else:
            rows = torch.empty(shape, dtype=torch.int64, device="meta")
        sent = yield from send(ctx, Shared(rows, 0))
        return Shared(table_rows(ctx, sent, weight), weight.frac)

    @classmethod
    def stock(cls, ids: Any, weight: Any) -> Any:
        """The client's one-hot rows, shared, times the shared table: CrypTen's matrix product."""
        from runtime import crypten_compat as crypten

        rows = torch.zeros((*ids.shape, weight.shape[0]), device=weight.device)
        if not ids.value.is_meta:
            rows.scatter_(-1, ids.value.to(rows.device)[..., None], 1.0)
        return crypten.cryptensor(rows, src=CLIENT).matmul(weight)
