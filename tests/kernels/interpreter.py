"""Triton's interpreter: import this module before any kernel of `runtime.kernels.cuda`."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

# isort: split
from typing import Any

import torch
from triton.runtime import interpreter

RECORDED: list[dict[str, Any]] = []
"""Kernels as they were launched: module, name, and the type or constant of each argument."""

_TYPES = {
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
    torch.uint8: "*u8", torch.float64: "*fp64",
}  # fmt: skip

_patch = interpreter._patch_lang_tensor


def _patched(tensor: Any, *scope: Any) -> None:
    """numpy refuses to take an array with one element for an integer, as the interpreter does.

    scope: what later versions of Triton restore their changes by.
    """
    _patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patched

_run = interpreter.GridExecutor.__call__


def _recorded(self: Any, *args: Any, **constants: Any) -> Any:
    types = [
        _TYPES[arg.dtype] if isinstance(arg, torch.Tensor) else "i64" if abs(arg) >> 31 else "i32"
        for arg in args
    ]
    names = [name for name in self.arg_names if name not in constants]
    launched = {
        "module": self.fn.__module__, "name": self.fn.__name__,
        "types": dict(zip(names, types, strict=True)),
        "constants": {name: constants[name] for name in self.arg_names if name in constants},
    }  # fmt: skip
    if launched not in RECORDED:
        RECORDED.append(launched)
    return _run(self, *args, **constants)


interpreter.GridExecutor.__call__ = _recorded
