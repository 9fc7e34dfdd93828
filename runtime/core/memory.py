"""Process-wide memory settings of a party."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LIMIT = 2**31 - 1
_STATUS = Path("/proc/self/status")


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of giving it back to the kernel.

    A step allocates and frees the same large buffers again and again. With the default settings
    each is a fresh mapping whose every page faults, which slows the making of masks down
    (docs/performance.md). Does nothing where the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _LIMIT)
        libc.mallopt(_M_TRIM_THRESHOLD, _LIMIT)
    except (OSError, AttributeError):
        return


def release_freed_memory() -> None:
    """Give what is free now back to the kernel: after a setup that took more than steps will."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def peak_bytes() -> int:
    """Largest resident set of this process so far.

    Where there is a /proc, from there: `getrusage` counts what a process was before it became this
    program, which is its parent's memory.
    """
    try:
        (line,) = (x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(line.split()[1]) * 1024
