"""Triton's interpreter: import this module before any kernel of `runtime.kernels.cuda`."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

# isort: split
from typing import Any

import torch
from triton.runtime import interpreter

RECORDED: list[dict[str, Any]] = []
"""Kernels as they were launched: module, name, what Triton may specialize arguments on, constants
and options.
"""

_LINE = 16
"""Triton asks whether addresses and numbers are multiples of this."""

_patch = interpreter._patch_lang_tensor


def _patched(tensor: Any, *scope: Any) -> None:
    """numpy refuses to take an array with one element for an integer, as the interpreter does.

    scope: what later versions of Triton restore their changes by.
    """
    _patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patched

_run = interpreter.GridExecutor.__call__


def _kind(argument: Any) -> Any:
    """Of words their type and where they begin; of a number one that is specialized alike."""
    if isinstance(argument, torch.Tensor):
        place = argument.storage_offset() * argument.element_size() % _LINE
        return str(argument.dtype).removeprefix("torch."), place
    if argument == 1:
        return 1
    number = _LINE if argument % _LINE == 0 else _LINE + 1
    return number << 40 if abs(argument) >> 31 else number


def _recorded(self: Any, *args: Any, **named: Any) -> Any:
    names = [name for name in self.arg_names if name not in named]
    launched = {
        "module": self.fn.__module__, "name": self.fn.__name__,
        "arguments": {name: _kind(arg) for name, arg in zip(names, args, strict=True)},
        "constants": {name: named[name] for name in self.arg_names if name in named},
        "options": {name: named[name] for name in named if name not in self.arg_names},
    }  # fmt: skip
    if launched not in RECORDED:
        RECORDED.append(launched)
    return _run(self, *args, **named)


interpreter.GridExecutor.__call__ = _recorded
