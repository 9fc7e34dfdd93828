"""Attention by a table of the server's: the weighted sum of values without queries and keys."""

from __future__ import annotations

import math
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Form, Kind, Op
from mergec.runtime.core.spec import Cost, Vis
from mergec.runtime.core.values import Shared
from mergec.runtime.kernels.matmul import matmul
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.protocols.weights import Constant, Moving, times_weight


class ConstantAttention(Op):
    """The last `new` rows of an attention whose weights depend on positions alone.

    values [B, G, L, D]: opened to the server, or to both if the table is shared. weight [H, P, Q],
    H a multiple of G: a constant of the server's, held or shared, that goes under a static mask.
    Row i of a head says how much the i-th token attends to each token; to those up to it if
    `causal`, to all otherwise (an encoder). Tokens from the P-th on attend as the last row does: to
    the same distances back, and to the first token. The result [B, H, new, D] is shared, with twice
    the program's fractional bits.

    end: for cross-attention, the position after the last row, which counts the tokens of another
    text than the values are of. Then the rows from the P-th on are the last row as it stands.
    Tokens after the Q-th have no weight, unless they are within a distance back.

    No message: the table is opened once in a session, each value once when it enters the cache.
    8 bytes offline per element of the result. Exact. What each party sees: `times_weight`. MERGE
    (Liang et al., AAAI 2024) has the idea of a constant attention; that it costs nothing online is
    due to the one-way form of the product.
    """

    name = "constant_attention"
    schema = (
        "(Tensor values, Tensor weight, SymInt new, SymInt? end=None, bool causal=True) -> Tensor"
    )
    weights = ("weight",)
    kind = Kind.ATTENTION

    @staticmethod
    def reference(
        values: torch.Tensor,
        weight: torch.Tensor,
        new: int,
        end: int | None = None,
        causal: bool = True,
    ) -> torch.Tensor:
        return _weighted(values, weight, (new, end, causal), torch.matmul)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        table = make.normal(6, 5, 5).abs()
        held, shared = {"weight": "weight"}, {"values": "masked", "weight": "shared"}
        cases = [
            Case([make.normal(1, 2, n, 8), table, 3], 5e-4, forms=forms)
            for n in (3, 5, 9)
            for forms in (held, shared)
        ]
        # An encoder's rows, as many as its table has, and more; cross-attention, within its table
        # and beyond it.
        cases += [
            Case([make.normal(1, 2, n, 8), table, n, None, False], 5e-4, forms=held) for n in (4, 8)
        ]
        cases += [
            Case([make.normal(1, 2, n, 8), table[:, :4], 2, end, False], 5e-4, forms=forms)
            for n, end, forms in ((3, 3, held), (7, 6, held), (5, 4, shared))
        ]
        few = make.uniform(4, 6, 6).tril()
        small = make.small(1, 2, 5, 4)
        return [
            *cases,
            Case([small, few, 3], stock=5e-4),
            Case([small, make.uniform(4, 6, 6) * 0.2, 1, 3, False], stock=5e-4),
        ]

    @classmethod
    def last_position(cls, dim: int) -> dict[str, Any] | None:
        """One row instead of `new`; all values count for it."""
        return {"new": 1} if dim == -2 else None

    @classmethod
    def forms(
        cls, values: Any, weight: Vis, new: Any, end: Any = None, causal: bool = True
    ) -> dict[str, Form]:
        return {"values": "masked" if weight is Vis.SHARED else "sent"}

    @classmethod
    def scale(cls, *args: object, fixed: int) -> int:
        return 2 * fixed

    @classmethod
    def cost(
        cls,
        values: Moving,
        weight: Constant,
        new: int,
        end: int | None = None,
        causal: bool = True,
        *,
        fixed: int,
    ) -> Cost:
        return Cost(offline=8 * math.prod(_shape(values, weight, new)))

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        values: Moving,
        weight: Constant,
        new: int,
        end: int | None = None,
        causal: bool = True,
    ) -> Protocol:
        """A product of two opened values; see `times_weight`."""
        yield from ()

        def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return _weighted(x, w.to(torch.int64), (new, end, causal), matmul)

        share = times_weight(ctx, values, weight, product, _shape(values, weight, new))
        return Shared(share, values.frac + weight.frac)

    @classmethod
    def stock(
        cls, values: Any, weight: Any, new: int, end: int | None = None, causal: bool = True
    ) -> Any:
        """CrypTen's matrix product with the shared table, opened anew in every step."""
        return _weighted(values, weight, (new, end, causal), lambda a, b: a.matmul(b))


def _shape(values: Any, weight: Any, new: int) -> tuple[int, ...]:
    return (values.shape[0], weight.shape[0], new, values.shape[-1])


Rows = tuple[int, int | None, bool]
"""`new`, `end` and `causal` of a call."""


def _weighted(values: Any, table: Any, asked: Rows, product: Any) -> Any:
    """Works on real tensors, on shares as integers, and on CrypTen's tensors."""
    batch, groups, length, features = values.shape
    heads, *size = table.shape
    new = asked[0]
    place, counts = _places(length, asked, *size)
    device = table.device
    flat = table.reshape(heads, -1)[:, to_device(place.reshape(-1), device, "public")]
    rows = flat * to_device(counts.reshape(-1), device, "public")
    # Heads of a group are further rows of one product.
    rows = rows.reshape(1, groups, heads // groups * new, length)
    return product(rows, values).reshape(batch, heads, new, features)


def _places(length: int, asked: Rows, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in a head's table each weight [new, length] stands, and whether it counts (1 or 0)."""
    new, end, causal = asked
    last = length if end is None else end
    row = torch.arange(last - new, last)[:, None]
    column = torch.arange(length)[None, :]
    source = column.expand(new, length)
    late = row >= rows
    if end is None:
        # The last row of the table ends at the token itself.
        source = torch.where(late & (column > 0), columns - 1 - (row - column), source)
    counts = (source < columns) & (~late | (column == 0) | (source > 0))
    if causal:
        counts = counts & (column <= row)
    place = row.clamp(max=rows - 1) * columns + source.clamp(0, columns - 1)
    return place, counts.to(torch.int64)
