"""Triton's interpreter: import this module before any kernel of `runtime.kernels.cuda`."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patched(tensor: Any) -> None:
    """numpy refuses to take an array with one element for an integer, as the interpreter does."""
    _patch(tensor)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patched
