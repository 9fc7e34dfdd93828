"""Rows of a table that token ids select."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import PUBLIC, Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import CLIENT, Cost
from mergec.runtime.core.values import Held, Masked, Shared
from mergec.runtime.protocols.local import as_share
from mergec.runtime.protocols.weights import Constant, table_rows, table_rows_cost


class Embedding(Op):
    """Rows of a table: ids [..., N] and weight [V, D] give [..., N, D].

    The client holds the ids, or they are public; the table is a constant of the server's, held or
    shared. The result is shared, with the table's fractional bits: the program's, and `bits` more
    if the compiler finds small rows. Secret ids: 1 round, 8 V bytes
    online and 8 D offline per id. Public ids of a shared table: local. Exact. The server sees
    one-hot rows minus a fresh uniform mask; the client sees nothing. A secret id outside of the
    table selects zeros, because a failure would tell the server about it.

    MERGE (AAAI 2024) names this product as the cost of private embedding; the one-way form is rule
    2 of docs/protocols.md.
    """

    name = "embedding"
    schema = "(Tensor ids, Tensor weight, int bits=0) -> Tensor"
    operands = {"ids": "held"}
    weights = ("weight",)
    choosers = ("ids",)
    kind = Kind.LINEAR

    @staticmethod
    def reference(ids: torch.Tensor, weight: torch.Tensor, bits: int = 0) -> torch.Tensor:
        # Where the table's shape alone is known, torch's embedding would first import SymPy.
        return weight.index_select(0, ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        ids, table = torch.tensor([[3, 0, 6]]), make.normal(7, 4)
        return [
            Case([ids, table], 1e-5, forms={"weight": "weight"}),
            Case([ids, table], 1e-5, forms={"weight": "shared"}),
            Case([ids, table], 1e-5, forms={"ids": PUBLIC, "weight": "shared"}),
            Case([torch.tensor([[2, 6, 0]]), make.small(7, 4)], stock=1e-4),
        ]

    @classmethod
    def scale(cls, ids: object, weight: object, bits: int = 0, *, fixed: int) -> int:
        return fixed + bits

    @classmethod
    def cost(cls, ids: Held | torch.Tensor, weight: Constant, bits: int = 0, *, fixed: int) -> Cost:
        if isinstance(ids, torch.Tensor):
            return Cost()
        return table_rows_cost(ids.value.numel(), weight)

    @classmethod
    def protocol(
        cls, ctx: Context, ids: Held | torch.Tensor, weight: Constant, bits: int = 0
    ) -> Protocol:
        """The client's one-hot rows times the table (`table_rows`); public ids only select rows."""
        if isinstance(ids, Held):
            rows = yield from table_rows(ctx, ids.value, weight)
            return Shared(rows, weight.frac)
        if not isinstance(weight, Masked):
            raise TypeError("public rows of a table that the server holds need no protocol")
        chosen = Masked(weight.opened[ids], weight.mask[ids], weight.frac)
        return Shared(as_share(ctx, chosen, weight.frac), weight.frac)

    @classmethod
    def stock(cls, ids: Any, weight: Any, bits: int = 0) -> Any:
        """The client's one-hot rows, shared, times the shared table: CrypTen's matrix product."""
        from mergec.runtime.crypten import compat as crypten

        if isinstance(ids, torch.Tensor):
            return weight[ids]
        rows = torch.zeros((*ids.shape, weight.shape[0]), device=weight.device)
        if not ids.value.is_meta:
            rows.scatter_(-1, ids.value.to(rows.device)[..., None], 1.0)
        return crypten.cryptensor(rows, src=CLIENT).matmul(weight)
