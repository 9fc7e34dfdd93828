"""The ranks of a party as rank 0 uses them: it orders, sends operands, and joins the parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count as numbers_from
from typing import NoReturn

import torch

from mergec.runtime.core.memory import WordsFile
from mergec.runtime.kernels.spread import Held, Ranks, Spread
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.ranks.link import MOST, Link, LostError, Order
from mergec.runtime.ranks.parts import DTYPES, Split, batched, product, room, taken


class Group(Ranks):
    """Rank 0's side. A party uses it from one thread at a time."""

    def __init__(
        self,
        link: Link,
        tell: Callable[..., None],
        fail: Callable[[LostError], NoReturn],
        file: WordsFile | None = None,
    ) -> None:
        """tell: sends the others an order. fail: raises what names the rank that is lost.

        file: one that the others can map, too.
        """
        self.count = link.count
        self._file = file
        self._link, self._tell, self._fail = link, tell, fail
        self._numbers = numbers_from(1)
        # A finalizer may run between an order and what belongs to it, so it only notes the number.
        self._dropped: deque[int] = deque()
        self._own: dict[int, int] = {}
        self._mapped: set[int] = set()

    # ------------------------------------------------------------------------------ holding

    def room(
        self, shape: Sequence[int], dtype: torch.dtype, axis: int, *, mapped: bool = False
    ) -> Spread:
        split = Split(tuple(shape), axis, self.count)
        number = next(self._numbers)
        fields = [DTYPES.index(dtype), mapped, axis, len(split.shape), *split.shape]
        self._order(Order.ROOM, number, *fields)
        part = room(split.part(0), dtype, self._link.device, mapped)
        self._own[number] = part.nbytes
        return Spread(self, Held(number, split.shape, axis, part, self._dropped.append), shape)

    def mapped(self, words: torch.Tensor) -> Spread | None:
        start = self._file.start(words) if self._file is not None else None
        if start is None:
            return None
        # Rows of a matrix are pages of their own; columns would be a piece of almost every page.
        split = Split(tuple(words.shape), 0, self.count)
        number = next(self._numbers)
        self._order(Order.MAP, number, DTYPES.index(words.dtype), start, *split.shape)
        own = split.cut(words, 0, 0)
        part = to_device(own, self._link.device, "input")
        self._own[number] = part.nbytes
        if part is own:
            self._mapped.add(number)
        return Spread(self, Held(number, split.shape, 0, part, self._dropped.append), words.shape)

    def release(self, words: torch.Tensor) -> None:
        if self._file is not None:
            self._file.release(words)

    def copy(self, source: Spread, target: Spread) -> None:
        rows = source.rows
        self._order(Order.COPY, target.held.number, source.held.number, rows)
        target.held.part[..., :rows, :] = source.held.part[..., :rows, :]

    def move(self, words: Spread, start: int, row: int) -> None:
        if self._split(words).by_rows:
            raise ValueError("rows that several ranks hold do not move")
        self._order(Order.MOVE, words.held.number, start, row)
        words.held.part[..., start, :] = words.held.part[..., row, :]

    def put(self, target: Spread, start: int, rows: torch.Tensor) -> None:
        split, length = self._split(target), rows.shape[-2]
        if not rows.numel():
            return
        self._order(Order.PUT, target.held.number, start, length)
        parts = [split.cut(rows, rank, start).to(target.dtype) for rank in range(self.count)]
        place, _, own = split.rows(0, start, length)
        target.held.part[..., place : place + own, :] = parts[0]
        with self._answering():
            if split.by_rows:  # most of such rows have one owner
                for rank, part in enumerate(parts):
                    if rank and part.numel():
                        self._link.send(part, rank)
            else:
                self._link.scatter([part.shape for part in parts], target.dtype, parts[1:])

    def whole(self, words: Spread) -> torch.Tensor:
        split, rows = self._split(words), words.rows
        self._order(Order.WHOLE, words.held.number, rows)
        own = words.held.part.narrow(-2, 0, split.rows(0, 0, rows)[2])
        joined = self._joined(own, split.first_rows(rows), split.axis, add=False)
        return joined.transpose(-1, -2) if words.turned else joined

    def held_bytes(self, *, mapped: bool = False) -> list[int]:
        """Bytes of the words that each rank holds, rank 0 first.

        mapped: only of those that lie in the file that all map, of which nothing was copied.
        """
        self._order(Order.COUNT, 0, mapped)
        with self._answering():
            others = self._link.gather([(1,)] * self.count, torch.int64, None)
        own = [size for number, size in self._own.items() if number in self._mapped or not mapped]
        return [sum(own), *map(int, others)]

    # ------------------------------------------------------------------------------ products

    def by_rows(self, x: torch.Tensor, weight: Spread) -> torch.Tensor:
        return self._product(x, weight, not weight.turned)

    def by_columns(self, x: torch.Tensor, weight: Spread) -> torch.Tensor:
        return self._product(x, weight, weight.turned)

    def _product(self, x: torch.Tensor, weight: Spread, turned: bool) -> torch.Tensor:
        split = self._split(weight)
        if weight.rows != split.shape[0]:
            raise ValueError("a product takes all rows of a weight")
        summed = 1 if turned else 0
        columns = split.shape[1 - summed]
        if not len(x) or 0 in split.shape:
            return torch.zeros((len(x), columns), dtype=torch.int64, device=x.device)
        self._order(Order.PRODUCT, weight.held.number, len(x), turned)
        added = split.axis == summed
        own = self._scattered(x, split) if added else self._to_all(x)
        found = product(own, weight.held.part, turned)
        return self._joined(found, split.results(len(x), summed), 1, add=added)

    def batched(self, a: torch.Tensor, b: Spread) -> torch.Tensor:
        split, (batch, groups, m, _), columns = self._split(b), a.shape, b.shape[-1]
        if split.shape[:2] != (batch, groups) or split.axis != 1:
            raise ValueError(f"{a.shape} @ {b.shape} is not split by heads")
        if not m or not b.numel():
            return torch.zeros((batch, groups, m, columns), dtype=torch.int64, device=a.device)
        self._order(Order.BATCH, b.held.number, b.rows, b.turned, m)
        own = self._scattered(a, split)
        found = batched(own, b.held.part, b.rows, b.turned)
        return self._joined(found, split.parts(batch, groups, m, columns), 1, add=False)

    def take(self, table: Spread, ids: torch.Tensor) -> torch.Tensor:
        split = self._split(table)
        if not len(ids):
            return torch.zeros((0, split.shape[1]), dtype=torch.int64, device=ids.device)
        self._order(Order.TAKE, table.held.number, len(ids))
        own = taken(table.held.part, self._to_all(ids), 0)
        return self._joined(own, split.results(len(ids), 0), 1, add=split.by_rows)

    # ------------------------------------------------------------------------------ the others

    def _split(self, words: Spread) -> Split:
        return Split(words.held.shape, words.held.axis, self.count)

    def _order(self, order: Order, *numbers: int) -> None:
        with self._answering():
            while self._dropped:
                few = [self._dropped.popleft() for _ in range(min(len(self._dropped), MOST))]
                for number in few:
                    del self._own[number]
                    self._mapped.discard(number)
                self._tell(Order.DROP, len(few), *few)
            self._tell(order, *numbers)

    def _to_all(self, words: torch.Tensor) -> torch.Tensor:
        with self._answering():
            return self._link.to_all(words)

    def _scattered(self, words: torch.Tensor, split: Split) -> torch.Tensor:
        """Send each rank its part of an operand, along dimension 1; returns rank 0's own."""
        parts = [
            words.narrow(1, first, last - first)
            for first, last in map(split.bounds, range(self.count))
        ]
        with self._answering():
            self._link.scatter([part.shape for part in parts], words.dtype, parts[1:])
        return parts[0]

    def _joined(
        self, own: torch.Tensor, shapes: Sequence[Sequence[int]], dim: int, *, add: bool
    ) -> torch.Tensor:
        """A result from its parts, of these shapes: their sum, or one after the other."""
        with self._answering():
            others = self._link.gather(shapes, own.dtype, None)
        if not add:
            return torch.cat([own, *others], dim)
        for part in others:
            own.add_(part)
        return own

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except LostError as error:
            self._fail(error)
