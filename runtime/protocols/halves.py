"""Comparison of a public number with a secret mask, with keys of a distributed point function.

Like `digits`, but the lookup returns the top bit of v - r itself: one bit instead of several. It is
the parity, over a range of places, of a table that is set only at r. The keys are longer than the
tables of narrow digits, but with a single bit, later steps need fewer dealt products of bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.spec import CLIENT
from mergec.runtime.correlations.dpf import (
    BLOCK_WORDS,
    LEAF_BITS,
    Generator,
    Keys,
    key_words,
    parities,
    sharing_bits,
)
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.formula import Polynomial


@dataclass(frozen=True)
class Dealt:
    """What a party uses for lookups; the dealer has no keys."""

    party: int
    keys: Keys | None
    generator: Generator


class Halves:
    """Comparison of `width`-bit numbers; attributes and methods match those of `digits.Digits`."""

    bits = 1
    less: Polynomial = {frozenset({0}): 1}

    def __init__(self, width: int) -> None:
        self.width = width
        self._depth = max(0, width - LEAF_BITS.bit_length() + 1)

    @property
    def dealt_bytes(self) -> int:
        """Bytes that the dealer sends to both parties together for one number."""
        return 2 * 8 * key_words(self._depth, BLOCK_WORDS)

    def deal(self, ctx: Context, count: int, mask: Callable[[], torch.Tensor]) -> Dealt:
        """Keys of the masks [count], modulo 2**width; `mask` is called by the dealer only."""

        generator = ctx.point_functions(1)

        def correct(roots: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            index = mask().long() & (2**self.width - 1)
            return sharing_bits(index, self._depth, generator)(roots)

        keys = ctx.deal_keys(count, key_words(self._depth, BLOCK_WORDS), correct)
        return Dealt(ctx.party, keys, generator)

    def look_up(self, points: torch.Tensor, dealt: Dealt) -> torch.Tensor:
        """XOR shares of the top bit of v - r for points v [T, n]: uint8 [T, n]."""
        if dealt.keys is None:
            return ghost(points.shape, dtype=torch.uint8)
        places = _PLACES(points, self.width)
        found = parities(dealt.keys, places, self._depth, dealt.party, dealt.generator)
        joined: torch.Tensor = _JOINED(found, places, dealt.party == CLIENT)
        return joined


def _places_host(points: torch.Tensor, width: int) -> torch.Tensor:
    values = points.numpy()
    places = np.empty((values.shape[1], 2 * len(values)), np.int64)
    _find_places(values, width, places)
    return torch.from_numpy(places)


def _places_tensors(points: torch.Tensor, width: int) -> torch.Tensor:
    starts = points.T + 1
    return torch.cat([starts, starts + (1 << (width - 1))], 1) & ((1 << width) - 1)


_PLACES = Kernel("elements.half_places", _places_host, _places_tensors, triton=False)


def _joined_host(found: torch.Tensor, places: torch.Tensor, flips: bool) -> torch.Tensor:
    out = torch.empty((found.shape[1] // 2, len(found)), dtype=torch.uint8)
    _join(found.numpy(), places.numpy(), flips, out.numpy())
    return out


def _joined_tensors(found: torch.Tensor, places: torch.Tensor, flips: bool) -> torch.Tensor:
    count = found.shape[1] // 2
    bits = found[:, :count] ^ found[:, count:]
    if flips:
        bits = bits ^ (places[:, :count] > places[:, count:]).to(torch.uint8)
    return bits.T.contiguous()


_JOINED = Kernel("elements.joined_halves", _joined_host, _joined_tensors, triton=False)


@compiled()
def _find_places(points, width, places):  # type: ignore[no-untyped-def]
    """The range of r for which v - r is in the upper half: from v + 1, half of all values."""
    ones, thresholds = (1 << width) - 1, points.shape[0]
    for t in range(thresholds):
        row = points[t]
        for i in range(points.shape[1]):
            places[i, t] = (row[i] + 1) & ones
            places[i, thresholds + t] = (row[i] + 1 + (ones + 1) // 2) & ones


@compiled()
def _join(found, places, flips, out):  # type: ignore[no-untyped-def]
    """[r is in the range]. Where the range wraps around, the client flips its share."""
    thresholds = out.shape[0]
    for i in range(found.shape[0]):
        for t in range(thresholds):
            bit = found[i, t] ^ found[i, thresholds + t]
            out[t, i] = bit ^ (flips and places[i, t] > places[i, thresholds + t])
