"""A cache, continued by new entries."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked, Room, Sent
from mergec.runtime.kernels.spread import copy_rows, write_rows

_LEAST_ROOM = 64
_SHARE_OF_ROOM = 4
"""A cache that has outgrown its tensors gets room for so many rows, or a quarter of its length."""


class CacheAppend(Op):
    """The cache [B, G, P, D] followed by the new entries [B, G, N, D]: [B, G, P + N, D].

    Both opened, to both parties or, where a product with a constant alone reads the cache, to the
    server; so is the result. Local and exact: an entry is opened once, when it enters the cache.
    """

    name = "cache_append"
    schema = "(Tensor past, Tensor new) -> Tensor"
    operands = {"past": "cache", "new": "cache"}
    result = "cache"
    local = True
    kind = Kind.MOVEMENT
    prepares = "new"

    @staticmethod
    def reference(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([past, new], -2)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        k, v = make.small(1, 2, 5, 4), make.small(1, 2, 5, 4)
        return [
            Case([make.normal(1, 2, 3, 4), make.normal(1, 2, 1, 4)], 1e-5),
            Case([k[:, :, :0], k], stock=1e-4),
            Case([k, v], stock=1e-4),
        ]

    @classmethod
    def cost(cls, past: Masked | Sent, new: Masked | Sent, *, fixed: int) -> Cost:
        return Cost()

    @classmethod
    def protocol(cls, ctx: Context, past: Masked | Sent, new: Masked | Sent) -> Protocol:
        """Concatenate two opened values; what was opened under its own mask stays as it is."""
        yield from ()
        return appended(ctx, past, new)

    @classmethod
    def stock(cls, past: Any, new: Any) -> Any:
        """CrypTen's concatenation of shares: local."""
        from mergec.runtime.crypten import compat as crypten

        return crypten.cat([past, new], -2)


def appended(ctx: Context, past: Masked | Sent, new: Masked | Sent) -> Masked | Sent:
    """A cache [..., P, D] followed by rows [..., N, D]; not copied while it has room (`Room`)."""
    length, total = past.shape[-2], past.shape[-2] + new.shape[-2]
    room = past.room
    if room is None or room.used != length or room.opened.shape[-2] < total:
        room = make_room(ctx, past, new.shape[-2])
    for part, rows in ((room.opened, new.opened), (room.mask, new.mask)):
        write_rows(part, length, rows)
    room.used = total
    opened, mask = (part.narrow(-2, 0, total) for part in (room.opened, room.mask))
    return type(past)(opened, mask, new.frac, room)


def make_room(ctx: Context, cache: Masked | Sent, new: int) -> Room:
    """A copy of a cache with room for `new` rows, and for more to come."""
    length = cache.shape[-2]
    rows = length + new + max(_LEAST_ROOM, (length + new) // _SHARE_OF_ROOM)
    opened, mask = (_longer(ctx, part, rows) for part in (cache.opened, cache.mask))
    return Room(opened, mask, length)


def _longer(ctx: Context, part: torch.Tensor, rows: int) -> torch.Tensor:
    """A tensor of so many rows that begins with `part`; without data where that has none."""
    longer = ctx.cache_room((*part.shape[:-2], rows, part.shape[-1]), part)
    copy_rows(part, longer)
    return longer
