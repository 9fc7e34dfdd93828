"""Tables that only the server is sent (`protocols.pieces`): what is read, and what is dealt."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch

_SIZE = 256


@triton.jit
def _word(lower, upper, extra, inside):  # type: ignore[no-untyped-def]
    """A word from its lower half and its `extra` bytes beyond it, up to four; extra is a block."""
    word = tl.load(lower, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    for byte in tl.static_range(4):
        more = tl.load(upper + byte, mask=inside & (extra > byte), other=0).to(tl.int64)
        word |= more << (32 + 8 * byte)
    return word


@kernel
def _values(  # type: ignore[no-untyped-def]
    table, halves, windows, basis, spans, out, count, row, terms, size, more, SIZE: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    window = tl.load(windows + place, mask=inside, other=0)
    lower = halves + place * (row // 4) + window * terms
    upper = table + place * row + 4 * terms * size + window * more
    total = place * 0
    for k in range(terms):
        extra, first = place * 0 + tl.load(spans + 2 * k), tl.load(spans + 2 * k + 1)
        word = _word(lower + k, upper + first, extra, inside)
        factor = tl.load(basis + place * terms + k, mask=inside, other=0)
        total += (word << (32 - 8 * extra)) * factor
    tl.store(out + place, total, mask=inside)


def values(
    table: torch.Tensor,
    windows: torch.Tensor,
    basis: torch.Tensor,
    pieces: Any,
    out: torch.Tensor,
) -> None:
    """Write a party's shares of the values to out [n], from its tables, uint8 [n, bytes]."""
    (count, row), layout = table.shape, pieces.layout(table.device)
    launch(
        _values, triton.cdiv(count, _SIZE), table, table.view(torch.int32), windows, basis,
        layout.spans, out, count, row, len(layout.spans), pieces.windows, len(layout.term),
        SIZE=_SIZE,
    )  # fmt: skip


@kernel
def _corrected(  # type: ignore[no-untyped-def]
    share, halves, found, turns, scales, spans, count, row, terms, size, more, SIZE: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    element, entry = place // size, place % size
    turn = tl.load(turns + element, mask=inside, other=0)
    source = found + (element * size + ((entry - turn) & (size - 1))) * terms
    lower = halves + element * (row // 4) + entry * terms
    upper = share + element * row + 4 * terms * size + entry * more
    for k in range(terms):
        extra, first = place * 0 + tl.load(spans + 2 * k), tl.load(spans + 2 * k + 1)
        # A scale is a power of two: one rounding, whether the sum is fused or not.
        value = tl.load(source + k, mask=inside, other=0.0) * tl.load(scales + k)
        word = tl.floor(value + 0.5).to(tl.int64)
        word -= _word(lower + k, upper + first, extra, inside)
        tl.store(lower + k, word.to(tl.int32), mask=inside)
        for byte in tl.static_range(4):
            above = (word >> (32 + 8 * byte)).to(tl.uint8)
            tl.store(upper + first + byte, above, mask=inside & (extra > byte))


def corrected(share: torch.Tensor, found: torch.Tensor, turns: torch.Tensor, pieces: Any) -> None:
    """Turn the client's share of tables, uint8 [n, bytes], into the server's.

    found: float64 [n, windows, terms]. turns: by how many entries the windows are moved, int64 [n].
    """
    count, layout = len(share) * pieces.windows, pieces.layout(share.device)
    launch(
        _corrected, triton.cdiv(count, _SIZE), share, share.view(torch.int32), found, turns,
        layout.scales, layout.spans, count, share.shape[1], len(layout.spans), pieces.windows,
        len(layout.term), SIZE=_SIZE,
    )  # fmt: skip
