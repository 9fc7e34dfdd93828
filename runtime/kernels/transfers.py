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

_ATEN = torch.ops.aten
_COPIES = (_ATEN._to_copy.default, _ATEN.copy_.default)
_NEW = (_ATEN.lift_fresh.default, _ATEN.lift_fresh_copy.default)
"""Operators on a tensor that was just made of numbers of the program, and has moved already."""
_READS = (
    _ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.masked_select.default,
    _ATEN.equal.default, _ATEN.allclose.default, _ATEN.bincount.default, _ATEN._unique2.default,
    _ATEN.unique_dim.default, _ATEN.unique_consecutive.default,
    _ATEN.unique_dim_consecutive.default,
)  # fmt: skip
"""Operators that read a device's words into the program, if only to know how long a result is."""
_INDEXED = (
    _ATEN.index.Tensor, _ATEN._unsafe_index.Tensor, _ATEN.index_put.default,
    _ATEN.index_put_.default, _ATEN._index_put_impl_.default, _ATEN._unsafe_index_put.default,
)  # fmt: skip
"""Operators that read indices if they are bools, and move them if they are on the CPU."""


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
        kwargs = kwargs or {}
        if _ALLOWED.depth:
            return func(*args, **kwargs)
        if _composite(func):
            # In inference mode `to`, `item` and others arrive whole, and would hide what they do.
            TorchDispatchMode.__enter__(self)
            try:
                return func.decompose(*args, **kwargs)
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        _check_reads(func, args, kwargs)
        result = func(*args, **kwargs)
        _check_copies(func, args, result)
        return result


@lru_cache(None)
def _composite(func: Any) -> bool:
    """Whether an operator of torch is made of others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return func.namespace == "aten" and bool(has(func.name(), key))


def watched(device: torch.device) -> AbstractContextManager[Any]:
    """A `Guard` for a party on this device, if the environment asks for it."""
    return nullcontext() if device.type == "cpu" or not os.environ.get(GUARD) else Guard()


def _places(*values: Any) -> set[str]:
    return {
        leaf.device.type
        for leaf in tree_leaves(values)
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta
    }


def _check_reads(func: Any, args: Any, kwargs: Any) -> None:
    """Before an operator runs: whether the program would wait for words of a device."""
    read = func in _READS
    if func in _INDEXED:
        kinds = {leaf.dtype for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)}
        read = bool(kinds & {torch.bool, torch.uint8})
        if "cpu" in _places(args[1]) and (there := _places(args[0]) - {"cpu"}):
            raise HiddenTransferError(f"{func} copies indices of the CPU to {max(there)}")
    elif func is _ATEN.repeat_interleave.Tensor:
        read = kwargs.get("output_size") is None
    if read and (there := _places(args, kwargs) - {"cpu"}):
        raise HiddenTransferError(f"{func} reads words of {max(there)}")


def _check_copies(func: Any, args: Any, result: Any) -> None:
    places = _places(args, result)
    if func in _COPIES and len(places) > 1:
        raise HiddenTransferError(f"{func} copies words between {' and '.join(sorted(places))}")
    if func in _NEW and places - {"cpu"}:
        raise HiddenTransferError(
            f"{func} copies numbers of the program to {max(places - {'cpu'})}"
        )
