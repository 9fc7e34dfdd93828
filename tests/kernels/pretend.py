"""A device that does not exist: words that claim to be on CUDA, and are computed on the CPU.

torch lets them meet no word of the CPU, as CUDA would, and kernels run on them under Triton's
interpreter. So a party that works on them copies nothing that it does not say, and a `Guard` sees
what it would see on a GPU.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import tests.kernels.interpreter  # noqa: F401

# isort: split
import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter

# Tensors with words of their own lose them in torch's inference mode. Steps are run in it, so this
# stands before what imports them.
torch.inference_mode = lambda mode=True: torch.no_grad()

# isort: split
from mergec.runtime.correlations import prg  # noqa: E402
from mergec.runtime.kernels import bitsliced  # noqa: E402
from mergec.runtime.kernels.cuda import cipher, trees  # noqa: E402

DEVICE = "cuda:0"
_COPY, _FILL = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class Words(torch.Tensor):
    """A tensor of the device; `inner` has its words."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Words:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __getitem__(self, index: Any) -> Any:
        return Words(self.inner[_indices(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.inner[_indices(index)] = _inner(value)

    def copy_(self, source: torch.Tensor, *given: Any) -> Words:
        if not isinstance(source, Words):
            raise RuntimeError("words of the CPU are copied to the device")
        self.inner.copy_(source.inner)
        return self

    def contiguous(self, *given: Any) -> Words:
        return self if self.inner.is_contiguous() else Words(self.inner.contiguous(*given))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the device")


class Device(TorchDispatchMode):
    """Runs torch's operators on `Words`; within it `DEVICE` exists."""

    def __init__(self) -> None:
        super().__init__()
        # torch would look for a driver before it lets another mode create a tensor on CUDA.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = any(isinstance(leaf, Words) for leaf in given)
        target = kwargs.get("device")
        if func is _COPY:
            here = here if target is None else target.type == "cuda"
        elif func is _FILL:
            here = isinstance(args[0], Words)
        elif here and any(leaf.device.type == "cpu" and leaf.dim() for leaf in given):
            raise RuntimeError(f"{func} with words of two devices")
        if target is not None and target.type == "cuda":
            here, kwargs["device"] = True, torch.device("cpu")
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        return tree_map(_wrapped, found) if here else found


def _indices(index: Any) -> Any:
    """Indices of the device; torch would look for a driver before any mode sees them."""
    for leaf in tree_leaves(index):
        if isinstance(leaf, torch.Tensor):
            if not isinstance(leaf, Words):
                raise RuntimeError("words of the device at indices of the CPU")
            if leaf.dtype is torch.bool:
                raise RuntimeError("an index of bools is read by the program")
    return tree_map(_inner, index)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Words) else value


def _wrapped(value: Any) -> Any:
    real = isinstance(value, torch.Tensor) and not value.is_meta
    return Words(value) if real else value


LAUNCHES: Counter[str] = Counter()
"""How often each kernel ran."""

_LOCK = threading.Lock()
_run = interpreter.GridExecutor.__call__


def _run_here(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The interpreter has one state for all threads."""
    with _LOCK, torch.utils._python_dispatch._disable_current_modes():
        result = _run(self, *map(_inner, args), **kwargs)
    LAUNCHES[self.fn.__name__] += 1
    return result


interpreter.GridExecutor.__call__ = _run_here


def _encrypt(*given: Any) -> tuple[Any, ...]:
    """`cipher.encrypt` on arrays, because the interpreter takes a hundred times as long for it.

    `tests.kernels.cases` runs the kernel itself.
    """
    *words, left, right, turn, rounds, both = given
    rounds, both = (getattr(each, "value", each) for each in (rounds, both))
    place = tl.arange(0, 128)
    used = place < 8 * (rounds + 1)

    def planes(keys: Any) -> np.ndarray:
        found = tl.load(keys + place, mask=used, other=0).handle.data
        return found.view(np.uint32)[: 8 * (rounds + 1)].reshape(-1, 8)

    keys = [[plane[None] for plane in row] for row in planes(left)]
    if both:
        chosen = turn.handle.data
        keys = [
            [one ^ (chosen & (one ^ other)) for one, other in zip(row, others, strict=True)]
            for row, others in zip(keys, planes(right), strict=True)
        ]
    a0, a1, a2, a3, b0, b1, b2, b3 = (word.handle.data for word in words)
    state = bitsliced.transpose(a0, b0, a1, b1, a2, b2, a3, b3)
    state = [plane ^ key for plane, key in zip(state, keys[0], strict=True)]
    for number in range(1, rounds + 1):
        state = [bitsliced.shift_row(plane) for plane in bitsliced.substitute(*state)]
        if number < rounds:
            state = bitsliced.mix_columns(*state)
        state = [plane ^ key for plane, key in zip(state, keys[number], strict=True)]
    a0, b0, a1, b1, a2, b2, a3, b3 = bitsliced.transpose(*state)
    like = words[0]
    return tuple(
        tl.tensor(interpreter.TensorHandle(each, like.handle.dtype), like.type)
        for each in (a0, a1, a2, a3, b0, b1, b2, b3)
    )


trees.encrypt = cipher.encrypt = _encrypt
prg._DEVICE_AHEAD = 1 << 16
