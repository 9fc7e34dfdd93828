"""Values that a program handles: who holds what of a secret, as seen by one party.

Where a party may not know a tensor, a meta tensor (shape without data) stands for it, so shapes
propagate at all three roles. The dealer runs the same program to learn which randomness is needed.
It holds meta tensors for all shares, and the actual masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mergec.runtime.core.spec import CLIENT, SERVER, Vis


@dataclass
class Shared:
    """An additive secret share: value * 2**frac = client's `share` + server's `share` mod 2**64."""

    share: torch.Tensor
    frac: int

    @property
    def shape(self) -> torch.Size:
        return self.share.shape


@dataclass
class Wide:
    """An additive secret share modulo 2**128, of which each party may drop bits (`protocols.wide`).

    low, high: its lower and upper 64 bits.
    """

    low: torch.Tensor
    high: torch.Tensor
    frac: int

    @property
    def shape(self) -> torch.Size:
        return self.low.shape


@dataclass
class Room:
    """Tensors that contain a cache [..., rows, D] at the start, with spare rows to extend it.

    used: number of rows that already belong to a cache. These never change, because one cache may
    be continued in two ways. New rows are written after them, and only to continue the longest
    cache.
    """

    opened: torch.Tensor
    mask: torch.Tensor
    used: int


@dataclass
class Masked:
    """A value opened once under a mask: both know `opened` = value * 2**frac + mask mod 2**64.

    mask: this party's additive share of the mask; at the dealer, the mask itself. room: for a
    cache, the larger tensors that it is the start of.
    """

    opened: torch.Tensor
    mask: torch.Tensor
    frac: int
    room: Room | None = None

    @property
    def shape(self) -> torch.Size:
        return self.opened.shape


@dataclass
class Sent:
    """A value opened to the server alone: it knows `opened` = value * 2**frac - mask mod 2**64.

    mask: known to the client and the dealer; a meta tensor at the server. room: for a cache, the
    larger tensors that it is the start of.
    """

    opened: torch.Tensor
    mask: torch.Tensor
    frac: int
    room: Room | None = None

    @property
    def shape(self) -> torch.Size:
        return self.opened.shape


@dataclass
class Held:
    """A value that one party knows in the clear; a meta tensor at the other roles."""

    vis: Vis
    value: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.value.shape


@dataclass(frozen=True)
class Expanded:
    """A static mask that is not kept, but expanded from its seed whenever it is used.

    pieces: makes its rows in order, some at a time, always the same.
    """

    shape: torch.Size
    pieces: Callable[[], Iterator[torch.Tensor]]


@dataclass
class Weight:
    """A server-held constant under a static mask that is opened once per session.

    encoded: value * 2**frac as integers, at the server. difference: encoded - mask mod 2**64, at
    the client. mask: at the dealer. Each is a meta tensor at the other roles.
    """

    encoded: torch.Tensor
    difference: torch.Tensor
    mask: torch.Tensor | Expanded
    frac: int

    @property
    def shape(self) -> torch.Size:
        return self.encoded.shape


Value = Shared | Wide | Masked | Sent | Held | Weight | torch.Tensor
"""A plain torch.Tensor is public. Every other kind of value is secret from at least one role."""


OWNER = {Vis.CLIENT: CLIENT, Vis.SERVER: SERVER}
"""The party that knows a held value."""


_KNOWN_TO = {Shared: Vis.SHARED, Wide: Vis.SHARED, Masked: Vis.SHARED, Sent: Vis.SHARED} | {
    Weight: Vis.SERVER
}


def visibility(value: object) -> Vis:
    """Who knows `value` in the clear."""
    return value.vis if isinstance(value, Held) else _KNOWN_TO.get(type(value), Vis.PUBLIC)


def encode(value: torch.Tensor, frac: int) -> torch.Tensor:
    """Fixed-point integers of a real tensor, rounded to nearest. Also works on meta tensors."""
    if not value.is_floating_point():
        return value.to(torch.int64) << frac
    return torch.round(value.to(torch.float64) * 2.0**frac).to(torch.int64)


def scale_rows(value: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    """The rows of a tensor, real numbers or words, multiplied by powers of two; exact.

    parts: (rows, exponent, rows, exponent, ...), as in `mpc.linear`; empty for no change.
    """
    if not parts or value.is_meta:
        return value
    factors = torch.repeat_interleave(2 ** torch.tensor(parts[1::2]), torch.tensor(parts[::2]))
    return value * factors.to(value).reshape(-1, *[1] * (value.dim() - 1))


def decode(value: torch.Tensor, frac: int) -> torch.Tensor:
    """The real numbers that fixed-point integers represent, as float64."""
    return value.to(torch.float64) * 2.0**-frac


def logical_shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift as unsigned 64-bit words; torch's own shift copies the sign."""
    if bits == 0:
        return value
    return (value >> bits) & ((1 << (64 - bits)) - 1)
