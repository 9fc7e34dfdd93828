"""The dealer's tables of digits (`protocols.digits`): a thread for each byte."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from mergec.runtime.kernels.cuda.launch import kernel, launch
from mergec.runtime.kernels.transfers import integers, to_device

_SIZE = 1024


@kernel
def _tables(words, layout, blocks, out, count, size, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    byte = layout + 4 * (place % size)
    shift = tl.load(byte, mask=inside, other=0)
    ones = tl.load(byte + 1, mask=inside, other=0)
    length = tl.load(byte + 2, mask=inside, other=0)
    first = tl.load(byte + 3, mask=inside, other=0)
    digit = (tl.load(words + place // size, mask=inside, other=0) >> shift) & ones
    tl.store(
        out + place, tl.load(blocks + first + digit * length, mask=inside, other=0), mask=inside
    )


@cache
def _layout(digits: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each byte of a number's tables the shift and mask of its digit, how many bytes this has,
    and where the byte is for the digit 0: int64 [bytes, 4]; and the tables of all digits.
    """
    places, blocks = digits.blocks
    lines = [
        number
        for shift, ones, _, length, offset in places.tolist()
        for byte in range(length)
        for number in (shift, ones, length, offset + byte)
    ]
    return integers(tuple(lines), device), to_device(torch.from_numpy(blocks), device, "public")


def tables(words: torch.Tensor, digits: Any) -> torch.Tensor:
    """The packed tables of each word [n]: uint8 [n, table_bytes]."""
    out = torch.empty((len(words), digits.table_bytes), dtype=torch.uint8, device=words.device)
    launch(
        _tables, triton.cdiv(out.numel(), _SIZE), words, *_layout(digits, words.device), out,
        out.numel(), digits.table_bytes, SIZE=_SIZE,
    )  # fmt: skip
    return out
