"""Columns of rows that stand for numbers of different sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def factors(parts: Sequence[int]) -> torch.Tensor:
    """A power of two for each column, float64, from (columns, exponent, columns, exponent, ...)."""
    return torch.exp2(_exponents(parts).double())


def groups(parts: Sequence[int], size: int) -> list[tuple[int, torch.Tensor]]:
    """Exponents in ascending order, each with the numbers of its columns.

    size: the number of columns; without parts, all of them have the exponent 0. Raises ValueError
    if the parts are of another number of columns.
    """
    of_column = _exponents(parts or (size, 0))
    if len(of_column) != size:
        raise ValueError(f"the parts have {len(of_column)} columns, the rows {size}")
    return [
        (int(exponent), torch.nonzero(of_column == exponent)[:, 0])
        for exponent in torch.unique(of_column)
    ]


def _exponents(parts: Sequence[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.tensor(parts[1::2]), torch.tensor(parts[::2]))
