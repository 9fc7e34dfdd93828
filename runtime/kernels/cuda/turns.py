"""Sines and cosines of odd multiples of a phase (`kernels.turns`)."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch
from mergec.runtime.kernels.transfers import integers
from mergec.runtime.kernels.turns import COSINE, FRAC, PHASE_BITS, SINE

_SIZE = 256


@kernel
def _turned(  # type: ignore[no-untyped-def]
    low, series, drops, out, count, cycles, terms,
    SERIES: tl.constexpr, FRAC: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside, one = place < count, place * 0 + 1
    half = one << (FRAC - 1)
    phase = tl.load(low + place, mask=inside, other=0) * cycles
    quarter = (phase + (one << (BITS - 3))) >> (BITS - 2)
    t = (phase - (quarter << (BITS - 2))) << 1
    square = (t * t) >> FRAC
    c, s = one * tl.load(series + SERIES - 1), one * tl.load(series + 2 * SERIES - 1)
    for down in range(1, SERIES):
        c = ((c * square) >> FRAC) + tl.load(series + SERIES - 1 - down)
        s = ((s * square) >> FRAC) + tl.load(series + 2 * SERIES - 1 - down)
    s = (s * t) >> FRAC
    crossed = (c ^ s) & -(quarter & 1)
    c = (c ^ crossed) * (1 - ((quarter + 1) & 2))
    s = (s ^ crossed) * (1 - (quarter & 2))
    c2, s2 = (c * c - s * s + half) >> FRAC, (s * c + c * s + half) >> FRAC
    d, e = c, s
    f, g = (d * c2 - e * s2 + half) >> FRAC, (e * c2 + d * s2 + half) >> FRAC
    c4, s4 = (c2 * c2 - s2 * s2 + half) >> FRAC, (s2 * c2 + c2 * s2 + half) >> FRAC
    for k in range(0, terms, 2):
        drop, other = tl.load(drops + k), tl.load(drops + k + 1)
        target = out + place * terms + k
        tl.store(target, (d + ((one << drop) >> 1)) >> drop, mask=inside)
        tl.store(target + 1, (e + ((one << other) >> 1)) >> other, mask=inside)
        h, i = (d * c4 - e * s4 + half) >> FRAC, (e * c4 + d * s4 + half) >> FRAC
        d, e, f, g = f, g, h, i


def turned(low: torch.Tensor, cycles: int, bits: np.ndarray) -> torch.Tensor:
    """Cosine and sine of `low` times 2 pi k cycles / 2**32, for odd k: int64 [n, terms]."""
    out = torch.empty((len(low), len(bits)), dtype=torch.int64, device=low.device)
    launch(
        _turned, triton.cdiv(len(low), _SIZE), low, integers(COSINE + SINE, low.device),
        integers(tuple((FRAC - bits).tolist()), low.device), out, len(low), cycles, len(bits),
        SERIES=len(COSINE), FRAC=FRAC, BITS=PHASE_BITS, SIZE=_SIZE,
    )  # fmt: skip
    return out
