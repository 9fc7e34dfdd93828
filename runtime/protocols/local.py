"""Local arithmetic on values of different visibility; nothing here sends a message."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.spec import DEALER
from mergec.runtime.core.values import Held, Masked, Shared, encode
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device


def shared_frac(*values: Any, default: int) -> int:
    """The most fractional bits among the shared values; `default` if none is shared."""
    return max((v.frac for v in values if isinstance(v, (Shared, Masked))), default=default)


def as_share(ctx: Context, value: Any, frac: int) -> torch.Tensor:
    """This party's additive share of any value with `frac` fractional bits.

    `frac` must be at least the value's own. A held value is shared as the value at its holder and
    zero at the other party; a public value as the value at the client and zero at the server.
    Nothing is sent. The dealer gets a meta tensor.
    """
    if ctx.party == DEALER:
        return ghost(value.shape)
    if isinstance(value, Masked):
        value = Shared(ctx.public(value.opened) - value.mask, value.frac)
    if isinstance(value, Shared):
        return value.share << (frac - value.frac) if frac != value.frac else value.share
    if isinstance(value, Held):
        if value.value.is_meta:
            return torch.zeros(value.shape, dtype=torch.int64, device=ctx.device)
        return to_device(encode(value.value, frac), ctx.device, "input")
    return ctx.public(to_device(encode(value, frac), ctx.device, "public"))
