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


_TOGETHER = 64
"""Phases whose turns are in a core's L1 cache at once."""


@compiled()
def _turn(low, cycles, drops, out):  # type: ignore[no-untyped-def]
    # Several phases at once, so that the compiler makes vector instructions of their products; that
    # factors have 32 bits tells it which. Results are written down row by row: one by one, with a
    # row between them, takes twice as long as the products.
    terms = out.shape[1]
    room, columns = np.empty((6, _TOGETHER), np.int32), np.empty((terms, _TOGETHER), np.int64)
    for start in range(0, low.shape[0], _TOGETHER):
        phases = low[start : start + _TOGETHER]
        count = phases.shape[0]
        turns = room[:, :count]
        _begin_turns(phases, cycles, turns)
        for k in range(0, terms, 2):
            cosines, sines = columns[k, :count], columns[k + 1, :count]
            _turn_on(turns, cosines, sines, drops[k], drops[k + 1])
        for e in range(count):
            row = out[start + e]
            for k in range(terms):
                row[k] = columns[k, e]


@compiled(inline="always")
def _begin_turns(phases, cycles, turns):  # type: ignore[no-untyped-def]
    """Cosines and sines of each phase, of three times, and of four times the phase."""
    c0, s0, c1, s1, c2, s2 = turns[0], turns[1], turns[2], turns[3], turns[4], turns[5]
    half = np.int64(1) << (FRAC - 1)
    for e in range(phases.shape[0]):
        phase = phases[e] * cycles
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
        d, t = (c * c - s * s + half) >> FRAC, (s * c + c * s + half) >> FRAC
        c0[e], s0[e] = c, s
        c1[e], s1[e] = (c * d - s * t + half) >> FRAC, (s * d + c * t + half) >> FRAC
        c2[e], s2[e] = (d * d - t * t + half) >> FRAC, (t * d + d * t + half) >> FRAC


@compiled(inline="always")
def _turn_on(turns, cosines, sines, drop, other):  # type: ignore[no-untyped-def]
    """Write the first turns down, and move on: from each turn to the one after the next, so that
    two products run at a time."""
    c0, s0, c1, s1, c2, s2 = turns[0], turns[1], turns[2], turns[3], turns[4], turns[5]
    half = np.int64(1) << (FRAC - 1)
    up, more = (np.int64(1) << drop) >> 1, (np.int64(1) << other) >> 1
    for e in range(c0.shape[0]):
        c, s, d, t = np.int64(c0[e]), np.int64(s0[e]), np.int64(c2[e]), np.int64(s2[e])
        c0[e], s0[e] = c1[e], s1[e]
        c1[e], s1[e] = (c * d - s * t + half) >> FRAC, (s * d + c * t + half) >> FRAC
        cosines[e], sines[e] = (c + up) >> drop, (s + more) >> other
