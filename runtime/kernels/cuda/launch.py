"""Launches of Triton kernels: the one place that they go through.

A kernel's masks are made of blocks alone: Triton's interpreter does not take a block's comparison
joined with one of plain numbers in all versions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

THREADS = 128
"""Threads of a program. Triton's interpreter runs one program after the other, so there it is all
that a call needs."""


def threads(lanes: int, count: int) -> int:
    """How many elements, of `lanes` threads each, a program takes on: a power of two.

    On a GPU the number does not depend on how many there are, or a kernel would be compiled anew
    for every size of a step. A tree's takes tens of seconds.
    """
    if triton.knobs.runtime.interpret:
        return triton.next_power_of_2(max(1, count))
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
