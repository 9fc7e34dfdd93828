"""Kernels compiled by numba, and cached on disk where a cache directory is writable."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba


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
    return lambda function: numba.njit(cache=can_keep(), nogil=True, **options)(function)
