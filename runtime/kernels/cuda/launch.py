"""Launches of Triton kernels: the one place that they go through.

Triton compiles a kernel anew for each set of types and constants that it is launched with. Unless
told otherwise it also does so for numbers that are 1, or divisible by 16, and for words whose
address is, which would be in the midst of a session: lengths grow with each step, and the words of
a stream or a message begin at any multiple of 8. A tree takes up to 40 s of a core. So `kernel`
turns that off, and constants follow from the program alone.

A kernel's masks are made of blocks alone: Triton's interpreter does not take a block's comparison
joined with one of plain numbers in all versions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton

THREADS = 128
"""Threads of a program."""


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` of what is launched: compiled once for each set of types and constants."""
    given = inspect.signature(function).parameters.values()
    names = [each.name for each in given if "constexpr" not in str(each.annotation)]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


def threads(lanes: int) -> int:
    """How many elements, of `lanes` threads each, a program takes on: a power of two.

    Whatever their number is, as another one would be another kernel.
    """
    return max(1, THREADS // lanes)


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run that many programs of a kernel on contiguous words; none if there is nothing to do.

    Tensors that are not contiguous are copied, so those that the kernel writes must be.
    """
    launch_strided(kernel, programs, *map(_contiguous, arguments), **constants)


def launch_strided(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """`launch` for a kernel that is told the strides of its words."""
    if programs:
        kernel[(programs,)](*arguments, **constants)


def _contiguous(argument: Any) -> Any:
    return argument.contiguous() if isinstance(argument, torch.Tensor) else argument
