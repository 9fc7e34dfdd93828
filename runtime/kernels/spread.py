"""Tensors of which each rank of a party holds a part; their products are computed where they lie.

A party that is larger than one device runs as several ranks (`runtime.ranks`). Rank 0 runs the
program and talks to the other parties. It sees large words as `Spread`: weights split by rows or
columns, caches by heads. A product modulo 2**64 is exact, so parts of it concatenate or add to the
same words as on one rank, and protocols need not know on how many ranks their party runs.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from mergec.runtime.kernels.transfers import to_device

_SLICE, _TRANSPOSE = torch.ops.aten.slice.Tensor, torch.ops.aten.transpose.int
_NARROW = torch.ops.aten.narrow.default  # a slice, unless in inference mode
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_INDEX = torch.ops.aten.index.Tensor


def bounds(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The indices, from first to before last, that a rank holds of `size` split among `ranks`."""
    return rank * size // ranks, (rank + 1) * size // ranks


class Held:
    """Words that the ranks hold, under a number; they drop them when nothing refers to this.

    shape: of the whole. axis: the dimension, not negative, that is split. part: rank 0's own.
    """

    def __init__(
        self,
        number: int,
        shape: Sequence[int],
        axis: int,
        part: torch.Tensor,
        drop: Callable[[int], None],
    ) -> None:
        self.number, self.shape, self.axis, self.part = number, tuple(shape), axis, part
        weakref.finalize(self, drop, number)


class Ranks(ABC):
    """The ranks of one party, as its rank 0 uses them."""

    count: int

    @abstractmethod
    def room(
        self, shape: Sequence[int], dtype: torch.dtype, axis: int, *, mapped: bool = False
    ) -> Spread:
        """Room for words of this shape, split along `axis`; uninitialized.

        mapped: on a CPU, each rank's part lies in a file that it maps.
        """

    @abstractmethod
    def mapped(self, words: torch.Tensor) -> Spread | None:
        """A matrix that lies in a file that all ranks map: each has its part of the rows there.

        On a CPU nothing is copied; on a device each rank copies its own part. None if the matrix
        does not lie in such a file.
        """

    @abstractmethod
    def release(self, words: torch.Tensor) -> None:
        """Let rank 0 hold no pages of words that lie in such a file, until it uses them again."""

    @abstractmethod
    def copy(self, source: Spread, target: Spread) -> None:
        """Copy all rows of `source` to the first ones of `target`, where they lie."""

    @abstractmethod
    def move(self, words: Spread, start: int, row: int) -> None:
        """Copy row `row` to row `start`, where they lie; rows are along the last dimension but one.

        Raises ValueError for words that are split along it.
        """

    @abstractmethod
    def put(self, target: Spread, start: int, rows: torch.Tensor) -> None:
        """Write `rows` from row `start` on; rows are along the last dimension but one."""

    @abstractmethod
    def by_rows(self, x: torch.Tensor, weight: Spread) -> torch.Tensor:
        """`x @ weight.T`: x [N, I] int64, weight [O, I]."""

    @abstractmethod
    def by_columns(self, x: torch.Tensor, weight: Spread) -> torch.Tensor:
        """`x @ weight`: x [N, V] int64, weight [V, D]."""

    @abstractmethod
    def batched(self, a: torch.Tensor, b: Spread) -> torch.Tensor:
        """`a @ b` for a [B, G, M, K] and b [B, G, K, N], split along G."""

    @abstractmethod
    def take(self, table: Spread, ids: torch.Tensor) -> torch.Tensor:
        """The rows [N, D] of a table [V, D] that ids [N] select; zeros for ids outside of it."""

    @abstractmethod
    def whole(self, words: Spread) -> torch.Tensor:
        """All words, on rank 0's device."""


class Spread(torch.Tensor):
    """Words of which each rank holds a part, as a tensor without data of its own.

    It may stand for the first rows of what is held, and for their transpose. Products
    (`kernels.matmul`), look-ups and these views stay spread. Any other function that only reads it
    runs on the whole, which is gathered for it: right, and slow. One that writes to it raises
    TypeError; see `write_rows`.
    """

    ranks: Ranks
    held: Held
    turned: bool

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, ranks: Ranks, held: Held, shape: Sequence[int], turned: bool = False
    ) -> Spread:
        part = held.part
        made: Spread = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=part.dtype, device=part.device
        )
        made.ranks, made.held, made.turned = ranks, held, turned
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Spread({list(self.shape)}, {self.dtype}, {self.ranks.count} ranks)"

    @property
    def rows(self) -> int:
        """How many rows of what is held it stands for."""
        return self.shape[-1 if self.turned else -2]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        this = args[0]
        if isinstance(this, Spread):
            if func in _SAME:
                return this._seen(this.shape)
            if func in (_SLICE, _NARROW) and not kwargs:
                seen = this._first_rows(*args[1:]) if len(args) <= 4 else None
                if seen is not None:
                    return seen
            if func is _TRANSPOSE and {d % this.dim() for d in args[1:]} == {
                this.dim() - 2,
                this.dim() - 1,
            }:
                size = [*this.shape[:-2], this.shape[-1], this.shape[-2]]
                return this._seen(size, not this.turned)
            if func is _INDEX and this.dim() == 2 and len(args[1]) == 1 and not this.turned:
                ids = args[1][0]
                if not ids.is_floating_point() and ids.dtype is not torch.bool:
                    ids = ids.long()
                    ids = torch.where(ids < 0, ids + this.shape[0], ids)
                    found = this.ranks.take(this, ids.reshape(-1))
                    return found.reshape(*ids.shape, this.shape[1])
        if func._schema.is_mutable:
            raise TypeError(f"{func} cannot write to words that lie on several ranks")
        args, kwargs = tree_map(whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _seen(self, shape: Sequence[int], turned: bool | None = None) -> Spread:
        # torch lets a view be an inference tensor only if what it is of is one.
        with torch.inference_mode(self.is_inference()):
            kept = self.turned if turned is None else turned
            return Spread(self.ranks, self.held, shape, kept)

    def _first_rows(
        self, dim: int = 0, start: int | None = None, end: int | None = None
    ) -> Spread | None:
        """The rows before `end`, if these are what a slice from `start` along `dim` has."""
        place = self.dim() - (1 if self.turned else 2)
        if dim % self.dim() != place or start or (end is not None and end < 0):
            return None
        size = list(self.shape)
        size[place] = size[place] if end is None else min(end, size[place])
        return self._seen(size)


def whole(words: Any) -> Any:
    """The words of a `Spread`, gathered; anything else as it is."""
    return words.ranks.whole(words) if isinstance(words, Spread) else words


def write_rows(target: torch.Tensor, start: int, rows: torch.Tensor) -> None:
    """Write rows, along the last dimension but one, from row `start` on."""
    if isinstance(target, Spread):
        target.ranks.put(target, start, rows)
    else:
        target[..., start : start + rows.shape[-2], :] = rows


def pick_rows(words: torch.Tensor, start: int, rows: Sequence[int]) -> None:
    """Write rows `start + rows`, which ascend, to row `start` and those behind it."""
    places = [start + row for row in rows]
    if isinstance(words, Spread):
        # None is written over before it is copied, as each moves towards the start.
        for place, row in enumerate(places, start):
            if place != row:
                words.ranks.move(words, place, row)
    else:
        # A copy: the rows lie among those that they are written over.
        index = to_device(torch.tensor(places), words.device, "public")
        write_rows(words, start, words.index_select(-2, index))


def copy_rows(source: torch.Tensor, target: torch.Tensor) -> None:
    """Write all rows of `source` to the first ones of `target`."""
    if isinstance(source, Spread) and isinstance(target, Spread):
        target.ranks.copy(source, target)
    else:
        write_rows(target, 0, source)
