"""Launches of Triton kernels: the one place that they go through."""

from __future__ import annotations

from typing import Any

import triton

THREADS = 128
"""Threads of a program. Triton's interpreter runs one program after the other, so there it is all
that a call needs."""


def threads(lanes: int, count: int) -> int:
    """How many elements, of `lanes` threads each, a program takes on: a power of two."""
    most = triton.next_power_of_2(max(1, count))
    if triton.knobs.runtime.interpret:
        return most
    return min(most, max(1, THREADS // lanes))


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run that many programs of a kernel; none if there is nothing to do."""
    if programs:
        kernel[(programs,)](*arguments, **constants)
