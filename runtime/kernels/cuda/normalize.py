"""The dealer's words for scaled rows (`protocols.normalize`)."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.elements import numbered
from mergec.runtime.kernels.cuda.launch import kernel, launch
from mergec.runtime.kernels.transfers import integers

_SIZE = 256


@kernel
def _words(  # type: ignore[no-untyped-def]
    mask, low, top, shifts, out, count, length, columns, words, down, tops, SIZE: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    row = place // length
    r = tl.load(mask + place, mask=inside, other=0)
    unsigned = r.to(tl.uint64, bitcast=True)
    own = out + place * words
    total, wrapped = place * 0, place * 0
    for k in range(columns):
        shift, number = tl.load(shifts + 2 * k), tl.load(shifts + 2 * k + 1)
        factor = tl.load(low + row * columns + k, mask=inside, other=0)
        right, left = tl.maximum(shift, 1), tl.maximum(-shift, 0)
        shifted = (unsigned >> right.to(tl.uint64)).to(tl.int64, bitcast=True)
        part = tl.where(shift > 0, shifted, r << left)
        # Columns with one shift have one word.
        tl.store(own + number, part, mask=inside & (place * 0 + shift > 0))
        wrapped += tl.where(shift > 0, factor << (64 - right), 0)
        total += part * factor
        topped = inside & (place * 0 + tops > 0)
        bit = tl.load(top + row * columns + k, mask=topped, other=0)
        tl.store(own + down + k, part * bit, mask=topped)
    tl.store(own + down + tops, total, mask=inside)
    first = (unsigned >> 63).to(tl.int64, bitcast=True)
    tl.store(own + down + tops + 1, first * wrapped, mask=inside)


def words(
    mask: torch.Tensor, low: torch.Tensor, top: torch.Tensor, shifts: np.ndarray
) -> torch.Tensor:
    """The dealer's words for rows under this mask [R, d], int64 [R, d, W]."""
    pairs, down = numbered(shifts)
    tops, device, count = top.shape[1], mask.device, mask.numel()
    width = down + tops + 2
    out = torch.empty((*mask.shape, width), dtype=torch.int64, device=device)
    launch(
        _words, triton.cdiv(count, _SIZE), mask, low, top, integers(tuple(pairs), device), out,
        count, mask.shape[1], len(shifts), width, down, tops, SIZE=_SIZE,
    )  # fmt: skip
    return out
