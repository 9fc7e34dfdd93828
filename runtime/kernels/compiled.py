"""Kernels compiled by numba, and cached on disk where a cache directory is writable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import IndexDataCacheFile

_CALLED = ("kernels", "correlations")
"""Folders of the kernels that kernels of other files call."""


@cache
def can_keep() -> bool:
    """Whether numba can cache: next to the code, in the user's cache, or in NUMBA_CACHE_DIR.

    A service may have neither a home directory nor write access to its installation.
    """
    try:
        numba.njit(cache=True)(lambda: None)
    except RuntimeError:
        return False
    return True


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's `njit` without the global interpreter lock, cached on disk where possible."""

    def compile_later(function: Callable[..., Any]) -> Any:
        kernel = numba.njit(cache=can_keep(), nogil=True, **options)(function)
        if can_keep():
            kept = kernel._cache
            kept._cache_file = KernelFile(
                kept.cache_path,
                kept._impl.filename_base,
                (kept._impl.locator.get_source_stamp(), _sources()),
            )
        return kernel

    return compile_later


class KernelFile(IndexDataCacheFile):
    """A kernel's files on disk: an index, and one file for each signature, named after it.

    numba numbers these files. Two processes that compile two signatures of a kernel at the same
    time may then choose one number, and an index that names the one's signature may lead to the
    other's code, which computes wrong words in silence. Roles that start together do just that.
    """

    def save(self, key: Any, data: Any) -> None:
        """Keep the code of a signature. Another process may lose the entry, but never exchange it.

        Losing one only compiles it again.
        """
        stem = self._index_name.removesuffix(".nbi")
        name = f"{stem}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


@cache
def _sources() -> tuple[tuple[str, float, int], ...]:
    """What tells whether a kernel's callees changed; numba looks at a kernel's own file alone."""
    root = Path(__file__).parent.parent
    files = sorted(file for folder in _CALLED for file in (root / folder).glob("*.py"))
    return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)
