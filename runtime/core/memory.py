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
    """Let glibc reuse freed memory instead of returning it to the kernel.

    A step allocates and frees the same large buffers repeatedly. With the default settings, each is
    a fresh mapping and every page of it faults, which slows mask generation down
    (docs/performance.md). Does nothing if the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _LIMIT)
        libc.mallopt(_M_TRIM_THRESHOLD, _LIMIT)
    except (OSError, AttributeError):
        return


def release_freed_memory() -> None:
    """Return free memory to the kernel, after a setup that needed more memory than steps will."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def peak_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    Reads /proc where it exists, because `getrusage` also counts what the process was before it
    became this program, which is its parent's memory.
    """
    try:
        (line,) = (x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(line.split()[1]) * 1024
