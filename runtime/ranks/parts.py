"""Which part of some words a rank holds, and what it computes with it: the same at every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergec.runtime.core.memory import mapped_words, returned_words
from mergec.runtime.kernels.matmul import matmul, matmul_columns, matmul_rows
from mergec.runtime.kernels.spread import bounds

DTYPES = (torch.int64, torch.int32)
"""Types of words that ranks hold, by their number in an order."""


@dataclass(frozen=True)
class Split:
    """Words of this shape, split along `axis` among so many ranks."""

    shape: tuple[int, ...]
    axis: int
    count: int

    @property
    def by_rows(self) -> bool:
        """Whether rows, along the last dimension but one, are what is split."""
        return self.axis == len(self.shape) - 2

    def bounds(self, rank: int) -> tuple[int, int]:
        """The indices along `axis` that a rank holds, from first to before last."""
        return bounds(self.shape[self.axis], self.count, rank)

    def size(self, rank: int) -> int:
        first, last = self.bounds(rank)
        return last - first

    def part(self, rank: int) -> tuple[int, ...]:
        """The shape of a rank's part."""
        return (*self.shape[: self.axis], self.size(rank), *self.shape[self.axis + 1 :])

    def rows(self, rank: int, start: int, length: int) -> tuple[int, int, int]:
        """What a rank holds of `length` rows from `start` on.

        Returns the first of them in its part, the first among the given rows, and how many.
        """
        if not self.by_rows:
            return start, 0, length
        first, last = self.bounds(rank)
        low, high = max(start, first), min(start + length, last)
        return (low - first, low - start, high - low) if low < high else (0, 0, 0)

    def rows_shape(self, rank: int, length: int) -> tuple[int, ...]:
        """The shape of so many rows of a rank's part."""
        part = self.part(rank)
        return (*part[:-2], length, part[-1])

    def first_rows(self, length: int) -> list[tuple[int, ...]]:
        """The shapes of all ranks' parts of the first rows."""
        each = range(self.count)
        return [self.rows_shape(rank, self.rows(rank, 0, length)[2]) for rank in each]

    def parts(self, *shape: int) -> list[tuple[int, ...]]:
        """The shapes of all ranks' parts of something else that is split as this is."""
        return Split(shape, self.axis, self.count).all_parts()

    def results(self, rows: int, summed: int) -> list[tuple[int, ...]]:
        """The shapes of all ranks' parts of a product with a matrix, which sums over an axis."""
        if self.axis == summed:
            return [(rows, self.shape[1 - summed])] * self.count
        return Split((rows, self.shape[self.axis]), 1, self.count).all_parts()

    def all_parts(self) -> list[tuple[int, ...]]:
        """The shapes of all ranks' parts."""
        return [self.part(rank) for rank in range(self.count)]

    def cut(self, words: torch.Tensor, rank: int, start: int) -> torch.Tensor:
        """A rank's part of rows that are those from `start` on."""
        if self.by_rows:
            _, first, length = self.rows(rank, start, words.shape[-2])
            return words.narrow(-2, first, length)
        first, last = self.bounds(rank)
        return words.narrow(self.axis, first, last - first)


def room(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, mapped: bool
) -> torch.Tensor:
    """Uninitialized room for a part. mapped: in a file, if it is int64 on a CPU."""
    if mapped and device.type == "cpu" and dtype is torch.int64 and all(shape):
        return mapped_words(shape)
    return returned_words(shape, torch.empty(0, dtype=dtype, device=device))


def product(x: torch.Tensor, part: torch.Tensor, turned: bool) -> torch.Tensor:
    """`x @ part`, or `x @ part.T`: of an empty part, zeros or nothing."""
    if not part.numel():
        shape = len(x), part.shape[0 if turned else 1]
        return torch.zeros(shape, dtype=torch.int64, device=x.device)
    return matmul_rows(x, part) if turned else matmul_columns(x, part)


def batched(a: torch.Tensor, part: torch.Tensor, length: int, turned: bool) -> torch.Tensor:
    """`a` times the first `length` rows of a part, or times their transpose."""
    rows = part.narrow(-2, 0, length)
    if not a.numel():
        shape = (*a.shape[:-1], length if turned else part.shape[-1])
        return torch.zeros(shape, dtype=torch.int64, device=a.device)
    return matmul(a, rows.transpose(-1, -2) if turned else rows)


def taken(part: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
    """The rows that ids select of a part that has those from `first` on.

    Rows that it does not have are zeros, so that the ranks' results add to the rows.
    """
    if not len(part):
        return torch.zeros((len(ids), part.shape[1]), dtype=torch.int64, device=ids.device)
    inside = (ids >= first) & (ids < first + len(part))
    rows = part[(ids - first).where(inside, 0)].long()
    return rows * inside[:, None]
