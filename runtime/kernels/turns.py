"""Sines and cosines of odd multiples of a phase, in integers, so that both parties agree."""

from __future__ import annotations

import math

import numpy as np
import torch

from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.transfers import integers

PHASE_BITS = 32
FRAC = 30
"""Fractional bits of sines and cosines."""

_TERMS = 6


def _series(first: int) -> tuple[int, ...]:
    """Coefficients of the cosine (first = 0) or sine (1) of t pi/4 by powers of t**2."""
    found, term = [], 1.0
    for power in range(2 * _TERMS):
        if power % 2 == first:
            found.append(round(term * 2**FRAC) * (-1) ** (power // 2))
        term *= math.pi / 4 / (power + 1)
    return tuple(found)


COSINE, SINE = _series(0), _series(1)
"""With these, an eighth of a turn to either side is right to 2**-28."""


def _turned_host(low: torch.Tensor, cycles: int, bits: np.ndarray) -> torch.Tensor:
    """Cosine and sine of `low` times 2 pi k cycles / 2**32, for odd k from 1 on: int64 [n, terms].

    bits: fractional bits of each, int64 [terms], at most 30.
    """
    out = torch.empty((len(low), len(bits)), dtype=torch.int64)
    _turn(low.numpy(), cycles, FRAC - bits, out.numpy())
    return out


def _turned_tensors(low: torch.Tensor, cycles: int, bits: np.ndarray) -> torch.Tensor:
    one = _cosine_and_sine(low * cycles)
    two = _product(one, one)
    four, turns = _product(two, two), [one, _product(one, two)]
    while 2 * len(turns) < len(bits):
        turns.append(_product(turns[-2], four))
    found = torch.stack([part for turn in turns for part in turn][: len(bits)], 1)
    drops = integers(tuple((FRAC - bits).tolist()), low.device)
    return (found + ((1 << drops) >> 1)) >> drops


_Turn = tuple[torch.Tensor, torch.Tensor]


def _product(one: _Turn, other: _Turn) -> _Turn:
    """Two turns, one after the other, as cosine and sine."""
    (c, s), (d, t), half = one, other, 1 << (FRAC - 1)
    return (c * d - s * t + half) >> FRAC, (s * d + c * t + half) >> FRAC


def _cosine_and_sine(phase: torch.Tensor) -> _Turn:
    """Of phases in units of 2 pi / 2**32, without a look-up: the dealer's are secret."""
    quarter = (phase + (1 << (PHASE_BITS - 3))) >> (PHASE_BITS - 2)
    t = (phase - (quarter << (PHASE_BITS - 2))) << 1
    square = (t * t) >> FRAC
    c, s = torch.full_like(t, COSINE[-1]), torch.full_like(t, SINE[-1])
    for term in range(_TERMS - 2, -1, -1):
        c, s = ((c * square) >> FRAC) + COSINE[term], ((s * square) >> FRAC) + SINE[term]
    s = (s * t) >> FRAC
    crossed = (c ^ s) & -(quarter & 1)
    c, s = c ^ crossed, s ^ crossed
    return c * (1 - ((quarter + 1) & 2)), s * (1 - (quarter & 2))


TURNED = Kernel("turns.turned", _turned_host, _turned_tensors)


@compiled()
def _turn(low, cycles, drops, out):  # type: ignore[no-untyped-def]
    half = np.int64(1) << (FRAC - 1)
    for i in range(low.shape[0]):
        phase = low[i] * cycles
        quarter = (phase + (1 << (PHASE_BITS - 3))) >> (PHASE_BITS - 2)
        t = (phase - (quarter << (PHASE_BITS - 2))) << 1
        square = (t * t) >> FRAC
        c, s = np.int64(COSINE[_TERMS - 1]), np.int64(SINE[_TERMS - 1])
        for term in range(_TERMS - 2, -1, -1):
            c = ((c * square) >> FRAC) + COSINE[term]
            s = ((s * square) >> FRAC) + SINE[term]
        s = (s * t) >> FRAC
        crossed = (c ^ s) & -(quarter & 1)
        c, s = (c ^ crossed) * (1 - ((quarter + 1) & 2)), (s ^ crossed) * (1 - (quarter & 2))
        # From each turn to the one after the next, so that two products run at a time.
        d, t = (c * c - s * s + half) >> FRAC, (s * c + c * s + half) >> FRAC
        now, after = (c, s), ((c * d - s * t + half) >> FRAC, (s * d + c * t + half) >> FRAC)
        d, t = (d * d - t * t + half) >> FRAC, (t * d + d * t + half) >> FRAC
        for k in range(0, out.shape[1], 2):
            c, s = now
            out[i, k] = (c + ((np.int64(1) << drops[k]) >> 1)) >> drops[k]
            out[i, k + 1] = (s + ((np.int64(1) << drops[k + 1]) >> 1)) >> drops[k + 1]
            now, after = after, ((c * d - s * t + half) >> FRAC, (s * d + c * t + half) >> FRAC)
