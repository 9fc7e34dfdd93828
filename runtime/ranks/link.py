"""What the ranks of a party send each other: tensors over torch.distributed, and never objects.

An order is a few integers, which rank 0 writes to a pipe of each other rank. What belongs to it
follows as collectives: operands from rank 0, to all or a part to each, and parts of results back.
All sizes follow from the orders, so nothing is unpickled.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from mergec.runtime.core.errors import MergecError

LOOPBACK = "127.0.0.1"
"""Where the ranks of a party listen for each other: they are processes of one machine."""

ORDER = struct.Struct("<16q")
"""An order: what to do, its operand's number, and up to 14 more integers; the rest is zero."""

MOST = 14
"""Most integers of an order beside these two."""

_MEETING = timedelta(seconds=60)
"""For how long ranks that have all started wait for each other."""

_LOOK = 20e-6
"""Seconds between two looks at whether the GPUs are done."""

_TAG = 0


class Order(IntEnum):
    """What rank 0 tells the others to do."""

    ROOM = 0
    COPY = 1
    PUT = 2
    PRODUCT = 3
    BATCH = 4
    TAKE = 5
    WHOLE = 6
    DROP = 7
    COUNT = 8
    MOVE = 9
    MAP = 10


class LostError(Exception):
    """The group does not answer: one of its ranks has ended, or takes too long."""


class Link:
    """A rank's connections to the others: gloo for words on the CPU, NCCL for those on CUDA."""

    def __init__(
        self, store: str, rank: int, count: int, device: torch.device, timeout: timedelta
    ) -> None:
        """Meet the others at `store`, a file that only the party's own user may read.

        timeout: how long a wait for another rank may take.
        """
        self.rank, self.count, self.device = rank, count, device
        self.intact: Callable[[], bool] = lambda: True
        """Whether the other processes run, as far as this rank can see."""
        with _lost():
            met = dist.FileStore(store, count)
            met.set_timeout(min(timeout, _MEETING))
            if device.type == "cuda":
                torch.cuda.set_device(device)
                more = dist.ProcessGroupNCCL.Options()
                more._timeout = timeout
                self._group: Any = dist.ProcessGroupNCCL(met, rank, count, more)
            else:
                gloo: Any = dist.ProcessGroupGloo
                options = gloo._Options()
                options._devices = [gloo.create_device(hostname=LOOPBACK)]
                options._timeout = timeout
                self._group = gloo(met, rank, count, options)

    def to_all(self, words: torch.Tensor) -> torch.Tensor:
        """Broadcast rank 0's words; the others pass room for them. Returns the words."""
        words = words.contiguous()
        with _lost():
            self._finish(self._group.broadcast(words, 0))
        return words

    def scatter(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, parts: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Send each rank its part; `parts` at rank 0 alone, those of ranks 1 and up.

        shapes: of all ranks' parts; that of rank 0 is of no matter. Returns this rank's part.
        """
        # The collective takes equal sizes.
        sizes = [math.prod(shape) for shape in shapes]
        most = max(sizes[1:])
        mine = torch.empty(most, dtype=dtype, device=self.device)
        sent = [torch.empty(most, dtype=dtype, device=self.device) for _ in shapes if parts]
        for room, part in zip(sent[1:], parts, strict=True):
            room[: part.numel()] = part.reshape(-1)
        options = dist.ScatterOptions()
        options.rootRank = 0
        if most:
            with _lost():
                self._finish(self._group.scatter([mine], [sent] if parts else [], options))
        return mine[: sizes[self.rank]].reshape(tuple(shapes[self.rank])) if self.rank else mine

    def gather(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, part: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Receive a part from each rank but the first; `part` at the others alone.

        shapes: as in `scatter`. Returns the parts at rank 0.
        """
        sizes = [math.prod(shape) for shape in shapes]
        most = max(sizes[1:])
        mine = torch.empty(most, dtype=dtype, device=self.device)
        if part is not None:
            mine[: part.numel()] = part.reshape(-1)
        root = self.rank == 0
        found = [torch.empty(most, dtype=dtype, device=self.device) for _ in shapes if root]
        options = dist.GatherOptions()
        options.rootRank = 0
        if most:
            with _lost():
                self._finish(self._group.gather([found] if root else [], [mine], options))
        return [
            room[:size].reshape(tuple(shape))
            for room, size, shape in zip(found, sizes, shapes, strict=root)
        ][1:]

    def send(self, words: torch.Tensor, rank: int) -> None:
        """Send words to one rank."""
        with _lost():
            self._finish(self._group.send([words.contiguous()], rank, _TAG))

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Receive what rank 0 sends."""
        words = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        with _lost():
            self._finish(self._group.recv([words], 0, _TAG))
        return words

    def _finish(self, work: Any) -> None:
        # Unlike gloo, NCCL does not notice that another rank has ended, and `wait` only lets the
        # stream wait.
        while self.device.type == "cuda" and not work.is_completed():
            if not self.intact():
                raise LostError("another rank has ended")
            time.sleep(_LOOK)
        work.wait()


class _lost:  # noqa: N801  (reads as a statement)
    """Turns what torch.distributed raises into LostError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            # The rest of the text is for programmers of clusters.
            raise LostError(str(error).partition(". This")[0].splitlines()[0]) from error


def device_of(device: str, rank: int) -> torch.device:
    """Where a rank computes: each on a GPU of its own. Raises MergecError if there are too few."""
    if torch.device(device).type != "cuda":
        return torch.device(device)
    there = torch.cuda.device_count()
    if rank >= there:
        raise MergecError(
            f"each rank needs a GPU of its own, and this machine has {there}; lower --ranks"
        )
    return torch.device("cuda", rank)
