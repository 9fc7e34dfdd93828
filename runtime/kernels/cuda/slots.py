"""Tables of slots (`protocols.slots`): what the server is sent, and sums of what parties read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch

_SIZE = 1024
_COLUMNS = 256


@kernel
def _one_hot(share, places, count, size, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    # No access depends on a place, which is secret.
    chosen = tl.load(places + place // size, mask=inside, other=0) & (size - 1)
    word = tl.load(share + place, mask=inside, other=0).to(tl.int32)
    found = (place % size == chosen).to(tl.int32) - word
    tl.store(share + place, found.to(share.dtype.element_ty), mask=inside)


def one_hot(share: torch.Tensor, places: torch.Tensor) -> None:
    """Turn the client's share [n, N] of tables that are one at these places into the server's."""
    count = share.numel()
    launch(
        _one_hot, triton.cdiv(count, _SIZE), share, places, count, share.shape[1], SIZE=_SIZE
    )  # fmt: skip


@kernel
def _tallied(tables, places, rows, out, size, width, blocks, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    element, block = program // blocks, program % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    read = (tl.load(places + element) - column) & (size - 1)
    word = tl.load(tables + element * size + read, mask=inside, other=0).to(tl.int32)
    tl.atomic_add(out + tl.load(rows + element) * width + column, word, mask=inside)


def tallied(
    tables: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """Sums of tables [n, N], each read from its place on downwards, over rows: `shape`."""
    out = torch.zeros(shape, dtype=torch.int32, device=tables.device)
    columns = min(_COLUMNS, triton.next_power_of_2(shape[1]))
    blocks = triton.cdiv(shape[1], columns)
    launch(
        _tallied, len(tables) * blocks, tables, places, rows, out, tables.shape[1], shape[1],
        blocks, COLUMNS=columns,
    )  # fmt: skip
    return out.to(tables.dtype)
