"""Memory of a party: settings of its process, words that lie in a file, and what it used."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

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


def mapped_words(shape: Sequence[int]) -> torch.Tensor:
    """An int64 tensor in a temporary file that is mapped; in memory if no file can be had.

    The kernel may write its pages to the file and drop them, so it can be larger than memory. The
    file is in the folder that TMPDIR names, only its owner can read it, and it has no name: it is
    gone as soon as the tensor is, or the process. Its space is reserved, because writing to a
    mapping for which the disk has no room would end the process.
    """
    count = math.prod(shape)
    try:
        descriptor, path = tempfile.mkstemp(prefix="mergec-")
    except OSError:
        return torch.empty(tuple(shape), dtype=torch.int64)
    try:
        os.posix_fallocate(descriptor, 0, 8 * count)
        words = torch.from_file(path, shared=True, size=count, dtype=torch.int64)
        return words.reshape(tuple(shape))
    except (OSError, RuntimeError, AttributeError):  # no room, no mapping, or not this system
        return torch.empty(tuple(shape), dtype=torch.int64)
    finally:
        os.close(descriptor)
        Path(path).unlink()


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
