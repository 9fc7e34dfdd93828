"""A rank of a party other than the first, as a process: it holds parts, and does as rank 0 orders.

It has neither a program nor a connection to another party, and no randomness. It reads its job from
its standard input, as one line of JSON, and then rank 0's orders. It says on its standard output
when it is ready and why it failed, and ends when its standard input does: when rank 0 has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from mergec.runtime.core.errors import DEBUG
from mergec.runtime.core.memory import WordsFile, keep_freed_memory
from mergec.runtime.kernels.matmul import set_threads
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.ranks.link import ORDER, Link, LostError, Order
from mergec.runtime.ranks.parts import DTYPES, Split, batched, product, room, taken

LOST = 3
"""Exit code of a rank that ends because another one did; rank 0 finds out which."""


@dataclass(frozen=True)
class Job:
    """What a rank is told when it starts.

    store: the file at which the ranks meet. timeout: seconds that another rank's answer may take.
    file: descriptor of the file of weights that all ranks map; None if there is none.
    """

    rank: int
    count: int
    store: str
    device: str
    threads: int
    timeout: float
    file: int | None = None

    def json(self) -> str:
        return json.dumps(asdict(self))


class Rank:
    """Holds this rank's parts by number, and carries orders out."""

    def __init__(self, link: Link, file: WordsFile | None = None) -> None:
        self._link, self._file = link, file
        self._parts: dict[int, tuple[Split, torch.Tensor]] = {}
        self._do: dict[Order, Callable[..., None]] = {
            Order.ROOM: self._room,
            Order.COPY: self._copy,
            Order.PUT: self._put,
            Order.PRODUCT: self._product,
            Order.BATCH: self._batch,
            Order.TAKE: self._take,
            Order.WHOLE: self._whole,
            Order.DROP: self._drop,
            Order.COUNT: self._count,
            Order.MOVE: self._move,
            Order.MAP: self._map,
        }

    def serve(self, orders: BinaryIO) -> None:
        """Carry out orders until their pipe ends. Raises LostError if the group falls apart."""
        while len(order := orders.read(ORDER.size)) == ORDER.size:
            what, *numbers = ORDER.unpack(order)
            self._do[Order(what)](*numbers)

    def _room(self, number: int, dtype: int, mapped: int, axis: int, dims: int, *rest: int) -> None:
        split = Split(rest[:dims], axis, self._link.count)
        shape = split.part(self._link.rank)
        part = room(shape, DTYPES[dtype], self._link.device, bool(mapped))
        self._parts[number] = split, part

    def _map(self, number: int, dtype: int, start: int, rows: int, columns: int, *_: int) -> None:
        if self._file is None:
            raise ValueError("this rank was given no file")
        split, kind = Split((rows, columns), 0, self._link.count), DTYPES[dtype]
        first, _last = split.bounds(self._link.rank)
        place = start + first * columns * kind.itemsize
        own = self._file.words(place, split.part(self._link.rank), kind)
        self._parts[number] = split, to_device(own, self._link.device, "input")

    def _copy(self, target: int, source: int, rows: int, *_: int) -> None:
        self._parts[target][1][..., :rows, :] = self._parts[source][1][..., :rows, :]

    def _move(self, number: int, start: int, row: int, *_: int) -> None:
        part = self._parts[number][1]
        part[..., start, :] = part[..., row, :]

    def _put(self, number: int, start: int, length: int, *_: int) -> None:
        split, part = self._parts[number]
        place, _first, rows = split.rows(self._link.rank, start, length)
        if not split.by_rows:
            shapes = [split.rows_shape(rank, length) for rank in range(split.count)]
            part[..., place : place + rows, :] = self._link.scatter(shapes, part.dtype, ())
        elif rows:
            shape = split.rows_shape(self._link.rank, rows)
            part[..., place : place + rows, :] = self._link.receive(shape, part.dtype)

    def _product(self, number: int, rows: int, turned: int, *_: int) -> None:
        split, part = self._parts[number]
        summed = 1 if turned else 0
        if split.axis == summed:
            operand = Split((rows, split.shape[summed]), 1, split.count)
            x = self._link.scatter(operand.all_parts(), torch.int64, ())
        else:
            x = self._link.to_all(self._empty(rows, split.shape[summed]))
        self._answer(product(x, part, bool(turned)), split.results(rows, summed))

    def _batch(self, number: int, length: int, turned: int, rows: int, *_: int) -> None:
        split, part = self._parts[number]
        batch, groups, _rows, features = split.shape
        inner, columns = (features, length) if turned else (length, features)
        a = self._link.scatter(split.parts(batch, groups, rows, inner), torch.int64, ())
        found = batched(a, part, length, bool(turned))
        self._answer(found, split.parts(batch, groups, rows, columns))

    def _take(self, number: int, count: int, *_: int) -> None:
        split, part = self._parts[number]
        ids = self._link.to_all(self._empty(count))
        first = split.bounds(self._link.rank)[0] if split.by_rows else 0
        self._answer(taken(part, ids, first), split.results(count, 0))

    def _whole(self, number: int, rows: int, *_: int) -> None:
        split, part = self._parts[number]
        own = part.narrow(-2, 0, split.rows(self._link.rank, 0, rows)[2])
        self._answer(own, split.first_rows(rows))

    def _drop(self, count: int, *numbers: int) -> None:
        for number in numbers[:count]:
            del self._parts[number]

    def _count(self, _number: int, mapped: int, *_: int) -> None:
        parts = [part for _, part in self._parts.values() if not mapped or self._in_file(part)]
        held = sum(part.nbytes for part in parts)
        self._answer(torch.tensor([held], device=self._link.device), [(1,)] * self._link.count)

    def _in_file(self, part: torch.Tensor) -> bool:
        return self._file is not None and self._file.start(part) is not None

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self._link.device)

    def _answer(self, words: torch.Tensor, shapes: Sequence[Sequence[int]]) -> None:
        self._link.gather(shapes, words.dtype, words)


def _say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def play(job: Job, orders: BinaryIO) -> int:
    """Run a rank until its orders end; returns the exit code. A failure is reported in one line.

    The report has the kind of the error and its place, but not its text, which might hold values.
    """
    try:
        set_threads(job.threads)
        torch.set_num_threads(job.threads)
        file = None if job.file is None else WordsFile(job.file)
        device, timeout = torch.device(job.device), timedelta(seconds=job.timeout)
        link = Link(job.store, job.rank, job.count, device, timeout)
        parent = os.getppid()
        link.intact = lambda: os.getppid() == parent
        _say(met=True)
        with torch.inference_mode():
            Rank(link, file).serve(orders)
        return 0
    except LostError:
        return LOST
    except Exception as error:  # noqa: BLE001  (whatever it is, rank 0 has to be told)
        if os.environ.get(DEBUG):
            traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        _say(failed=f"{type(error).__name__} at {place}")
        return 1


def main() -> NoReturn:
    """The process of a rank."""
    # Whoever ends the party ends rank 0, which may have an answer to finish before.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    orders = sys.stdin.buffer
    line = orders.readline()
    code = 0
    if line:
        _say(ready=True)
        code = play(Job(**json.loads(line)), orders)
    os._exit(code)  # the group's own threads might keep the process


if __name__ == "__main__":
    main()
