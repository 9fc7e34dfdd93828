"""Comparison of a public number with a secret mask, by the key of a point function.

As in `digits`, but what is looked up is the top bit of v - r itself, one bit instead of several:
the parity, between two places, of a table that is set at r alone. Keys are longer than the tables
of narrow digits; with one bit there are fewer products of bits to deal in what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from runtime.context import Context
from runtime.correlations.dpf import (
    BLOCK_WORDS,
    LEAF_BITS,
    Generator,
    Keys,
    key_words,
    parities,
    sharing_bits,
)
from runtime.protocols.formula import Polynomial
from runtime.spec import CLIENT


@dataclass(frozen=True)
class Dealt:
    """What a party looks up in; the dealer has no keys."""

    party: int
    keys: Keys | None


class Halves:
    """Numbers of `width` bits; attributes and methods as those of `digits.Digits`."""

    bits = 1
    less: Polynomial = {frozenset({0}): 1}

    def __init__(self, width: int) -> None:
        self.width = width
        self._depth = max(0, width - LEAF_BITS.bit_length() + 1)

    @property
    def dealt_bytes(self) -> int:
        """What the dealer sends both parties for one number."""
        return 2 * 8 * key_words(self._depth, BLOCK_WORDS)

    def deal(self, ctx: Context, count: int, mask: Callable[[], torch.Tensor]) -> Dealt:
        """Keys of the masks [count] that `mask` gives at the dealer, modulo 2**width."""

        def correct(roots: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            index = mask().cpu().numpy() & (2**self.width - 1)
            return sharing_bits(index, self._depth, Generator(1))(roots)

        keys = ctx.deal_keys(count, key_words(self._depth, BLOCK_WORDS), correct)
        return Dealt(ctx.party, keys)

    def look_up(self, points: torch.Tensor, dealt: Dealt) -> torch.Tensor:
        """XOR shares of the top bit of v - r for points v [T, n]: uint8 [T, n]."""
        if dealt.keys is None:
            return torch.empty(points.shape, dtype=torch.uint8, device="meta")
        ones = 2**self.width - 1
        first = points.cpu().numpy().T + 1
        # v - r is in the upper half for the r from v + 1 on, half of all.
        begin, end = first & ones, (first + (ones + 1) // 2) & ones
        places = np.concatenate([begin, end], 1)
        found = parities(dealt.keys, places, self._depth, dealt.party, Generator(1))
        result = found[:, : len(points)] ^ found[:, len(points) :]
        if dealt.party == CLIENT:
            result ^= (begin > end).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(result.T)).to(points.device)
