"""Memory of a party: settings of its process, words that lie in a file, and what it used."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import resource
import tempfile
import warnings
import weakref
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


_OWN_PAGES = 1 << 16
"""Bytes of a tensor from which it pays to ask the kernel for pages of its own."""


def returned_words(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """An uninitialized tensor as `like.new_empty` is, whose pages the kernel has back when it goes.

    For what grows: glibc would keep each size that was outgrown (`keep_freed_memory`). Small
    tensors, and those that are not in memory, are those of `new_empty`.
    """
    size = math.prod(shape) * like.itemsize
    if like.device.type != "cpu" or size < _OWN_PAGES:
        return like.new_empty(tuple(shape))
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(tuple(shape))


class WordsFile:
    """A file of words that this process maps, and others by the same descriptor.

    Nothing is read before it is used, and processes that map the file share its pages, which the
    kernel can drop. A file that takes this one's name later is another file: what is mapped here
    stays. To write to a mapped tensor ends the process.
    """

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor over. Raises ValueError if the file is empty, OSError if it cannot
        be mapped."""
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            # torch has no tensors that cannot be written to, and says so.
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def open(cls, path: Path) -> WordsFile:
        """The file of this name; raises as the constructor does."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def words(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Words that lie in the file from byte `start` on.

        Raises ValueError if it ends before, or if words cannot begin there.
        """
        size = math.prod(shape) * dtype.itemsize
        if not 0 <= start <= start + size <= len(self._bytes) or start % dtype.itemsize:
            raise ValueError(f"the file has no {size} bytes of {dtype} from {start} on")
        return self._bytes[start : start + size].view(dtype).view(tuple(shape))

    def start(self, words: torch.Tensor) -> int | None:
        """The byte of the file at which the words of a tensor begin; None if they lie elsewhere."""
        if words.is_meta or words.device.type != "cpu" or not words.is_contiguous():
            return None
        start = words.data_ptr() - self._bytes.data_ptr()
        return start if start >= 0 and start + words.nbytes <= len(self._bytes) else None

    def release(self, words: torch.Tensor) -> None:
        """Let this process hold no pages of these words; they are mapped again when they are used.

        Pages that reach beyond the words stay. Does nothing for words that lie elsewhere.
        """
        start = self.start(words)
        if start is None:
            return
        size = mmap.PAGESIZE
        first, last = -(-start // size) * size, (start + words.nbytes) // size * size
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


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
