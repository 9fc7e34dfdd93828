"""Words that move between the CPU and a device, and a guard against those that move unnoticed.

A party on a device keeps its words there. What may cross is a message, the dealer's bytes, an input
or output, and public values that depend on lengths or on the program alone. Each of these goes
through `to_device` or `to_host`, with its reason. Inside of a `Guard` anything else raises.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Reason = Literal["message", "dealt", "input", "output", "public"]

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""Operators that read a device's words into the program, which then depends on them."""


class HiddenTransferError(RuntimeError):
    """Words would be copied between devices, or read by the program, where nobody said so."""


_PINNED_BYTES = 1 << 25
"""Bytes that are pinned at once. torch keeps what was pinned, in blocks of powers of two."""


class _Allowed(threading.local):
    depth = 0


_ALLOWED = _Allowed()
_GUARDS: list[Guard] = []
_KEPT = 256

GUARD = "MERGEC_DEVICE_GUARD"
"""With this in the environment a party on a device runs in a `Guard`, which takes time."""


def to_device(words: torch.Tensor, device: torch.device, reason: Reason) -> torch.Tensor:
    """Words of the CPU on a device: pinned first if the device is CUDA. None moves if it is there.

    Weights, which may be larger than what can be pinned, move a piece at a time. reason: why they
    may move, as a `Guard` counts it.
    """
    here = words.is_cpu if device.type == "cpu" else words.device.type == device.type
    if here or words.is_meta:
        return words
    if device.type == "meta":
        return words.to(device)
    with _passing(words, reason):
        if device.type == "cuda" and words.numel() and torch.cuda.is_available():
            if words.nbytes > _PINNED_BYTES:
                return _in_pieces(words, device, torch.Tensor.pin_memory)
            return words.pin_memory().to(device, non_blocking=True)
        return words.to(device)


def _in_pieces(
    words: torch.Tensor, device: torch.device, pin: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    made = torch.empty(words.shape, dtype=words.dtype, device=device)
    count = max(1, _PINNED_BYTES // words.itemsize)
    for target, piece in zip(
        made.view(-1).split(count), words.reshape(-1).split(count), strict=True
    ):
        target.copy_(pin(piece), non_blocking=True)
    return made


def to_host(words: torch.Tensor, reason: Reason) -> torch.Tensor:
    """Words of a device on the CPU, complete when this returns; see `to_device`."""
    if words.is_cpu:
        return words
    with _passing(words, reason):
        if words.is_cuda and words.numel() and torch.cuda.is_available():
            pinned = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
            pinned.copy_(words, non_blocking=True)
            torch.cuda.current_stream(words.device).synchronize()
            return pinned
        return words.to("cpu")


@lru_cache(_KEPT)
def integers(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A few public numbers on a device, which move there once: int64."""
    return to_device(torch.tensor(values, dtype=torch.int64), device, "public")


@contextmanager
def _passing(words: torch.Tensor, reason: Reason) -> Iterator[None]:
    for guard in _GUARDS:
        guard.bytes[reason] += words.nbytes
        guard.copies[reason] += 1
    _ALLOWED.depth += 1
    try:
        yield
    finally:
        _ALLOWED.depth -= 1


class Guard(TorchDispatchMode):
    """Raises HiddenTransferError where words cross, or are read, without a reason.

    bytes, copies: what crossed for each reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __enter__(self) -> Guard:
        _GUARDS.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _GUARDS.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        result = func(*args, **(kwargs or {}))
        if not _ALLOWED.depth:
            _check(func, args, result)
        return result


def watched(device: torch.device) -> AbstractContextManager[Any]:
    """A `Guard` for a party on this device, if the environment asks for it."""
    return nullcontext() if device.type == "cpu" or not os.environ.get(GUARD) else Guard()


def _check(func: Any, args: Any, result: Any) -> None:
    places = {
        leaf.device.type
        for leaf in (*tree_leaves(args), *tree_leaves(result))
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta
    }
    if func in _COPIES and len(places) > 1:
        raise HiddenTransferError(f"{func} copies words between {' and '.join(sorted(places))}")
    if func in _READS and places - {"cpu"}:
        raise HiddenTransferError(f"{func} reads words of {max(places - {'cpu'})}")
